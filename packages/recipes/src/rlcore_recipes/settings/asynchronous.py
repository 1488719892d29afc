"""Settings of asynchronous training."""

from __future__ import annotations

from pydantic import Field, create_model

from rlcore.config import Config


class AsyncSettings(Config):
    """Generating for the next steps while this one trains."""

    max_staleness: int = Field(
        0,
        ge=0,
        description="Maximum policy versions between the one that made a token and the one that it trains. 0 is "
        "strictly on-policy: steps generate, then train. From 1 on (one step off) generation never stops; it needs "
        "controller.kind=ray and a pool for the rollout. See the page on asynchronous training.",
    )
    max_concurrent_groups: int | None = Field(
        None,
        ge=1,
        description="Maximum prompts whose completions are generated at the same time, over all rollout processes; "
        "null: as many as max_staleness allows. Fewer start later, and so from newer weights.",
    )


# The section is called "async", which Python keeps for itself: such a field has no literal notation.
AsyncSection: type[Config] = create_model(
    "AsyncSection",
    __base__=Config,
    **{"async": (AsyncSettings, Field(default_factory=AsyncSettings, description="Asynchronous training."))},  # type: ignore[call-overload]
)
