"""The parts of a step, in the order of the dataflow: generate → log-probs → scores → advantages → update → sync.

Each function times itself under ``timing_s/``. Where models run in other processes (``executor.overlaps``) `rollouts`
and `add_logprobs` return while rewards and log-probs are still computed.
"""

from rlcore_recipes.step.advantages import add_advantages
from rlcore_recipes.step.first_weights import restart_policy
from rlcore_recipes.step.logprobs import add_logprobs, add_values
from rlcore_recipes.step.metrics import step_metrics
from rlcore_recipes.step.process_rewards import add_process_rewards, update_prm
from rlcore_recipes.step.rationalization import add_rationalizations
from rlcore_recipes.step.rollout import add_scores, rollouts
from rlcore_recipes.step.selection import add_sample_weights, save_selected
from rlcore_recipes.step.update import imitate, update_critic, update_policy
from rlcore_recipes.step.validation import validate_completions
from rlcore_recipes.step.weights import sync_weights

__all__ = [
    "add_advantages",
    "add_logprobs",
    "add_process_rewards",
    "add_rationalizations",
    "add_sample_weights",
    "add_scores",
    "add_values",
    "imitate",
    "restart_policy",
    "rollouts",
    "save_selected",
    "step_metrics",
    "sync_weights",
    "update_critic",
    "update_policy",
    "update_prm",
    "validate_completions",
]
