"""DAPO: GRPO with clip-higher, token-mean loss, dynamic sampling and overlong shaping.

Source: Yu et al., 2025, arXiv:2503.14476.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from rlcore.algorithms.objectives import PolicyObjectiveSettings
from rlcore.algorithms.shaping import OverlongSettings
from rlcore.cli import run_recipe_module
from rlcore_recipes.batch_metrics import batch_metrics
from rlcore_recipes.collect import training_batch
from rlcore_recipes.credit import with_advantages
from rlcore_recipes.forward import judged
from rlcore_recipes.restarts import restarting
from rlcore_recipes.session import Session, open_session, train_rl, validate_completions
from rlcore_recipes.settings import ActorSettings, AlgorithmSettings, DynamicSamplingSettings, RLConfig
from rlcore_recipes.updates import sync_policy, update_actor


class DAPOAlgorithmSettings(AlgorithmSettings):
    """Advantages, reward shaping and dynamic sampling."""

    overlong: OverlongSettings | None = Field(
        default_factory=lambda: OverlongSettings(buffer=128),
        description="Punishment of completions close to data.max_response_length; null is off.",
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

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.algorithm.dynamic_sampling is not None and self.rollout.n == 1:
            yield "rollout.n", "is 1: dynamic sampling compares several completions of a prompt"
        late = self.reward_model is not None and self.asynchronous.max_staleness > 0
        if self.algorithm.dynamic_sampling is not None and late:
            yield "reward_model", "is too late for dynamic sampling: in asynchronous training it scores whole batches"


@restarting
def run(config: DAPOConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    with open_session(config, dynamic=config.algorithm.dynamic_sampling, validate=validate_completions) as session:
        train_rl(session, "dapo", step)


def step(session: Session[DAPOConfig], number: int) -> dict[str, float]:
    """Generate and score until the batch is full of groups that teach something, compare within groups, update."""
    timed = session.timed
    batch, sampled = training_batch(session, number, judged)
    with timed("adv"):
        batch, metrics = with_advantages(session, batch)
    with timed("update_actor"):
        metrics.update(update_actor(session, batch))
    with timed("update_weights"):
        metrics.update(sync_policy(session, version=number))
    return session.executor.compute(batch_metrics, batch, number - 1) | sampled | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("dapo")
