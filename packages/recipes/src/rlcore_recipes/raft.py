"""RAFT: fine-tuning on the best of several completions (Dong et al., 2023, arXiv:2304.06767).

Rejection sampling and best-of-n: a step is a round that generates, scores, keeps the good completions and imitates
them. With other selectors and settings also expert iteration, STaR and reward-weighted fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from rlcore.algorithms.objectives import PolicyObjectiveSettings
from rlcore.cli import run_recipe_module
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings import ActorSettings, RLConfig
from rlcore_recipes.settings.selection import RaftAlgorithmSettings, selection_problems
from rlcore_recipes.step import (
    add_advantages,
    add_logprobs,
    add_rationalizations,
    add_sample_weights,
    add_scores,
    imitate,
    restart_policy,
    rollouts,
    save_selected,
    step_metrics,
    sync_weights,
    validate_completions,
)


class RaftConfig(RLConfig):
    """One run of rejection sampling."""

    own_columns = frozenset({"sample_weight"})

    actor: ActorSettings = Field(
        default_factory=lambda: ActorSettings(objective=PolicyObjectiveSettings(policy_loss="reinforce")),
        description="The policy under training.",
    )
    algorithm: RaftAlgorithmSettings = Field(
        default_factory=RaftAlgorithmSettings, description="Selection, and what happens before the update."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the reason of what cannot work."""
        yield from super().problems()
        yield from selection_problems(self, self.algorithm)

    def scheduled_updates(self, steps: int) -> int:
        """Return the optimizer steps of the schedule, which `restart_policy` begins again in every step."""
        return self.updates_per_step if self.algorithm.restart else super().scheduled_updates(steps)


@restarting
def run(config: RaftConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_rl("raft", config, step, validate_completions)


def step(session: Session[RaftConfig], number: int) -> dict[str, float]:
    """Generate, score, keep the good completions, imitate them."""
    samples = rollouts(session, number)
    batch = add_scores(session, samples.batch, samples)
    batch, metrics = add_sample_weights(session, batch)  # 0 for what is left out: algorithm.selection
    batch, found = add_rationalizations(session, batch)  # more rows, for prompts of which nothing was kept
    metrics |= found
    unsaved = save_selected(session, batch, number)
    batch = add_logprobs(session, batch)  # for a loss with a ratio, or a KL loss
    batch, found = add_advantages(session, batch)  # the weights
    restart_policy(session, number)
    metrics |= found
    metrics |= imitate(session, batch)
    metrics |= sync_weights(session, version=number)
    sampled = batch.slice(0, len(samples.batch))
    return step_metrics(session, sampled, number) | samples.metrics | unsaved | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("raft")
