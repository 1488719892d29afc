"""Settings of `textarena`."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, JsonValue, field_validator

from rlcore.config import Package
from rlcore.object_path import checked_object_path
from rlcore_agents.environment.settings import EnvironmentSettings


class TextArenaSettings(EnvironmentSettings):
    """Settings of `textarena`: a game of TextArena, with the policy as one player or as all of them."""

    game: str = Field(description="Id of the game, such as GuessTheNumber-v0 or TicTacToe-v0.")
    kwargs: dict[str, JsonValue] = Field({}, description="Keyword arguments of the game, in place of those of its id.")
    players: int | None = Field(None, ge=1, le=16, description="Number of players; null: the fewest of the game.")
    player: int | None = Field(
        None, ge=0, description="Place of the policy among the players; null: drawn for every sample."
    )
    opponent: str = Field(
        "self",
        description="The other players: self (the policy plays all of them, and is trained on all), random (actions "
        "that are not invalid), or 'file.py:name' of a function of the observations and a random.Random that returns "
        "an action.",
    )
    actions: tuple[str, ...] = Field(
        (), description="What random opponents draw from; empty: the texts in brackets that they are shown."
    )
    unfinished_score: float = Field(
        -1.0, description="Score of the policy in a game that a limit of the episode ends; a lost game is -1."
    )

    @field_validator("opponent")
    @classmethod
    def _is_a_kind(cls, opponent: str) -> str:
        return opponent if opponent in ("self", "random") else checked_object_path(opponent)

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "", Package("textarena", "rlcore-agents[textarena]")
