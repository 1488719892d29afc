"""Settings of `openenv`."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, JsonValue

from rlcore.config import Package
from rlcore_agents.environment.settings import EnvironmentSettings


class OpenEnvSettings(EnvironmentSettings):
    """Settings of `openenv`: an environment server of OpenEnv."""

    url: str = Field(pattern=r"^https?://", description="Address of the server, such as http://127.0.0.1:8000.")
    reset: dict[str, JsonValue] = Field({}, description="Further arguments of the environment's reset, besides seed.")
    action_field: str | None = Field(
        None,
        description="Field of the action that the text of a reply becomes; null: the only one that the action "
        "requires, if it is text, else a reply must be the action as a JSON object.",
    )
    observation_field: str | None = Field(
        None, description="Field of observations that is shown; null: the only one that is text, else all as JSON."
    )

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "", Package("openenv", "rlcore-agents[openenv]")
