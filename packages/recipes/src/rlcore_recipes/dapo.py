"""DAPO: GRPO with clip-higher, token-mean loss, dynamic sampling and overlong shaping.

Source: Yu et al., 2025, arXiv:2503.14476.
"""

from __future__ import annotations

from pydantic import Field

from rlcore.algorithms.objectives import PolicyObjectiveSettings
from rlcore.algorithms.shaping import OverlongSettings
from rlcore.cli import run_recipe_module
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings import ActorSettings, AlgorithmSettings, DynamicSamplingSettings, RLConfig
from rlcore_recipes.step import (
    add_advantages,
    add_logprobs,
    add_scores,
    rollouts,
    step_metrics,
    sync_weights,
    update_policy,
    validate_completions,
)


class DAPOAlgorithmSettings(AlgorithmSettings):
    """Advantages, reward shaping and dynamic sampling."""

    overlong: OverlongSettings | None = Field(
        default_factory=lambda: OverlongSettings(buffer=128),
        description="Penalty on completions close to data.max_response_length; null is off.",
    )
    dynamic_sampling: DynamicSamplingSettings | None = Field(
        default_factory=DynamicSamplingSettings, description="Dynamic sampling; null is off."
    )


class DAPOConfig(RLConfig):
    """One run of DAPO."""

    actor: ActorSettings = Field(
        default_factory=lambda: ActorSettings(
            objective=PolicyObjectiveSettings(policy_loss={"name": "ppo", "clip_low": 0.2, "clip_high": 0.28})
        ),
        description="The policy under training.",
    )
    algorithm: DAPOAlgorithmSettings = Field(
        default_factory=DAPOAlgorithmSettings, description="Advantages, reward shaping and dynamic sampling."
    )

    @property
    def dynamic_sampling(self) -> DynamicSamplingSettings | None:
        return self.algorithm.dynamic_sampling


@restarting
def run(config: DAPOConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_rl("dapo", config, step, validate_completions)


def step(session: Session[DAPOConfig], number: int) -> dict[str, float]:
    """Generate and score until the batch is full of groups whose scores differ, compare within groups, update."""
    samples = rollouts(session, number)  # dropped groups are replaced: algorithm.dynamic_sampling
    batch = add_logprobs(session, samples.batch)
    batch = add_scores(session, batch, samples)
    batch, metrics = add_advantages(session, batch)  # of scores after the overlong punishment: algorithm.overlong
    metrics |= update_policy(session, batch)  # clip-higher, token-mean loss: actor.objective
    metrics |= sync_weights(session, version=number)
    return step_metrics(session, batch, number) | samples.metrics | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("dapo")
