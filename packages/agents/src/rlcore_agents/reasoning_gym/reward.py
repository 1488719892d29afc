"""The reward ``reasoning_gym``: a task's own scorer, in the worker processes of the reward ``function``.

In processes with limits, because scorers simplify formulas that the policy wrote, which may take for ever.
"""

from __future__ import annotations

from rlcore import plugins
from rlcore.engines.reward import Reward
from rlcore.engines.settings import RewardSettings
from rlcore_agents.reasoning_gym.settings import ReasoningGymReward


def reasoning_gym_reward(options: ReasoningGymReward, settings: RewardSettings) -> Reward:
    """Make the reward; `rlcore_agents.reasoning_gym.scoring.score` is what it calculates."""
    function = plugins.get("rlcore.rewards", "function")
    chosen = {"path": "rlcore_agents.reasoning_gym.scoring:score", "form": "sample", "kwargs": options.model_dump()}
    return function.build(function.config_class().model_validate(chosen), settings)  # type: ignore[no-any-return]
