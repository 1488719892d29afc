"""SPIN: self-play fine-tuning, in which demonstrations are preferred to the policy's own completions (Chen et al.,
2024, arXiv:2401.01335).

The policy is its opponent: completions are those of the current policy, and the reference is the policy of the
beginning of the iteration.
"""

from __future__ import annotations

from rlcore.cli import run_recipe_module
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings.spin import SpinConfig
from rlcore_recipes.step import add_scores, rollouts, step_metrics, sync_weights, validate_completions
from rlcore_recipes.step.opponent import renew_reference
from rlcore_recipes.step.pairs import add_pair_reference, demonstration_pairs, update_on_pairs


@restarting
def run(config: SpinConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_rl("spin", config, step, validate_completions)


def step(session: Session[SpinConfig], number: int) -> dict[str, float]:
    """Generate, compare with demonstrations, update."""
    renew_reference(session, number)  # at the beginning of an iteration
    samples = rollouts(session, number)  # of each prompt the demonstration, and completions of the policy
    batch = add_scores(session, samples.batch, samples)
    sampled, pairs, metrics = demonstration_pairs(session, batch)
    pairs = add_pair_reference(session, pairs)
    metrics |= update_on_pairs(session, pairs)
    metrics |= sync_weights(session, version=number)
    return step_metrics(session, sampled, number) | samples.metrics | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("spin")
