"""Online DPO: preferences between the policy's own completions, by their rewards (Guo et al., 2024, arXiv:2402.04792).

The losses are those of the recipe dpo that compare two answers.
"""

from __future__ import annotations

from rlcore.cli import run_recipe_module
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings.online_preference import OnlinePreferenceConfig
from rlcore_recipes.step import add_scores, rollouts, step_metrics, sync_weights, validate_completions
from rlcore_recipes.step.pairs import add_pair_reference, completion_pairs, update_on_pairs


@restarting
def run(config: OnlinePreferenceConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_rl("online_dpo", config, step, validate_completions)


def step(session: Session[OnlinePreferenceConfig], number: int) -> dict[str, float]:
    """Generate, score, compare completions of a prompt, update."""
    samples = rollouts(session, number)
    batch = add_scores(session, samples.batch, samples)  # waits for the rewards
    batch, pairs, metrics = completion_pairs(session, batch)  # the best and the worst of a prompt: algorithm.pairs
    pairs = add_pair_reference(session, pairs)
    metrics |= update_on_pairs(session, pairs)
    metrics |= sync_weights(session, version=number)
    return step_metrics(session, batch, number) | samples.metrics | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("online_dpo")
