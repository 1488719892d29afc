"""Nim with one heap: who takes the last stone wins. A player loses, against perfect play, at multiples of most + 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from rlcore.config import Config
from rlcore_recipes.games.game import Game, games


class NimParams(Config):
    """Parameters of ``nim``."""

    stones: int = Field(9, ge=1, le=500, description="Stones in the largest heap with which a game starts.")
    most: int = Field(3, ge=1, le=100, description="Stones that a player may take at most.")


@dataclass(frozen=True)
class Nim(Game):
    """The game; a state is the number of stones."""

    stones: int
    most: int

    @property
    def rules(self) -> str:
        """The rules."""
        return (
            f"Two players take 1 to {self.most} stones in turn. Who takes the last stone wins. Answer with the number "
            "of stones that you take, in brackets: [1]"
        )

    def starts(self) -> Sequence[str]:
        return [str(stones) for stones in range(1, self.stones + 1)]

    def describe(self, state: str) -> str:
        return f"{state} stones are left."

    def moves(self, state: str) -> Sequence[str]:
        return [str(taken) for taken in range(1, min(self.most, int(state)) + 1)]

    def play(self, state: str, move: str) -> str:
        return str(int(state) - int(move))

    def result(self, state: str) -> float:
        return 0.0  # the other player has taken the last stone


@games.register("nim", params=NimParams)
def nim(params: NimParams) -> Game:
    """Make Nim: one heap of stones, from which players take a few in turn; who takes the last one wins."""
    return Nim(params.stones, params.most)
