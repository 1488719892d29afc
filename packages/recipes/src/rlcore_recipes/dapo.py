"""DAPO: GRPO with clip-higher, token-mean loss, dynamic sampling and overlong shaping.

Source: Yu et al., 2025, arXiv:2503.14476.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from rlcore.algorithms.objectives import PolicyObjectiveSettings
from rlcore.algorithms.registries import sampling_filters
from rlcore.algorithms.shaping import OverlongSettings
from rlcore.cli import run_recipe_module
from rlcore.config import Choice, Chosen, Config
from rlcore_recipes.batch_metrics import batch_metrics
from rlcore_recipes.collect import generate_and_score, refill
from rlcore_recipes.credit import with_advantages
from rlcore_recipes.forward import with_old_logprobs, with_ref_logprobs
from rlcore_recipes.session import Session, open_session, train_rl
from rlcore_recipes.settings import ActorSettings, AlgorithmSettings, RLConfig
from rlcore_recipes.updates import sync_policy, update_actor


class DynamicSamplingSettings(Config):
    """Groups that teach nothing are dropped, and further prompts generated for until the batch is full."""

    filter: Annotated[Choice, Chosen(sampling_filters)] = Field("nonzero-spread", description="Which groups are kept.")
    max_generations: int = Field(
        10, ge=1, description="Most rounds of generation for a step; then dropped groups fill what is missing."
    )


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


def run(config: DAPOConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    # one prompt at a time: how many a step takes is known only while it samples
    draw = None if config.algorithm.dynamic_sampling is None else 1
    with open_session(config, draw=draw) as session:
        train_rl(session, "dapo", step)


def step(session: Session[DAPOConfig], number: int) -> dict[str, float]:
    """Generate and score until the batch is full of groups that teach something, compare within groups, update."""
    config, roles, timed = session.config, session.roles, session.timed
    dynamic, sampled = config.algorithm.dynamic_sampling, dict[str, float]()
    if dynamic is None:
        batch = generate_and_score(session, next(session.prompts))
    else:
        batch, sampled = refill(session, dynamic.filter, dynamic.max_generations)
    if config.needs_old_logprobs:
        with timed("old_log_prob"):
            batch = with_old_logprobs(roles.actor, batch, config)
    if roles.ref is not None:
        with timed("ref"):
            batch = with_ref_logprobs(roles.ref, batch, config)
    with timed("adv"):
        batch, metrics = with_advantages(batch, config.algorithm, session.kl, config.data.max_response_length)
    with timed("update_actor"):
        metrics.update(update_actor(roles.actor, batch, config))
    with timed("update_weights"):
        sync_policy(roles, config, version=number)
    return batch_metrics(batch) | sampled | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("dapo")
