"""Settings of asynchronous training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field, create_model

from rlcore.config import Config

if TYPE_CHECKING:
    from rlcore_recipes.settings.reinforcement import RLConfig

TRAINED_OR_JUDGED = ("actor", "critic", "ref", "reward_model")
"""Roles whose processes work in step with each other: a rollout among them could not generate meanwhile."""


class AsyncSettings(Config):
    """Generating for the next steps while this one trains."""

    max_staleness: int = Field(
        0,
        ge=0,
        description="Most policy versions between the one that made a token and the one that it trains. 0 is strictly "
        "on-policy: steps generate, then train. From 1 on (one step off) generation never stops; it needs "
        "controller.kind=ray and a pool for the rollout. See the page on asynchronous training.",
    )
    max_concurrent_groups: int | None = Field(
        None,
        ge=1,
        description="Most prompts generated for at once, over all rollout processes; null: as many as max_staleness "
        "allows. Fewer start later, and so from newer weights.",
    )


# The section is called "async", which Python keeps for itself: such a field has no literal notation.
AsyncSection: type[Config] = create_model(
    "AsyncSection",
    __base__=Config,
    **{"async": (AsyncSettings, Field(default_factory=AsyncSettings, description="Asynchronous training."))},  # type: ignore[call-overload]
)


def async_problems(config: RLConfig) -> Iterator[tuple[str, str]]:
    """Why ``config`` cannot be trained asynchronously, if it is to be."""
    k, controller = config.asynchronous.max_staleness, config.controller
    if k == 0:
        if config.asynchronous.max_concurrent_groups is not None:
            yield "async.max_concurrent_groups", "is for asynchronous training; this run has async.max_staleness=0"
        return
    if controller.kind != "ray":
        yield (
            "async.max_staleness",
            f"is {k}, which needs rollout processes that work beside training: set controller.kind=ray and put the "
            "rollout on a pool of its own (controller.pools, controller.placement.rollout)",
        )
        return
    _, placed = controller.mapping(config.roles)
    beside = [role for role in TRAINED_OR_JUDGED if placed.get(role) == placed["rollout"]]
    if beside:
        yield (
            "async.max_staleness",
            f"is {k}, but the rollout shares the pool {placed['rollout']!r} with {', '.join(beside)} and would wait "
            "for them: put it on another one (controller.placement.rollout)",
        )
    advantage = config.algorithm.advantage
    if config.reward_model is not None and "baseline_score" in advantage.entry.needs:
        yield (
            "reward_model",
            f"would score samples but not the baselines that {advantage.name} compares them with: in asynchronous "
            "training those get the reward's score alone",
        )
