"""What a game is, the registry of games, and perfect play."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rlcore.config.registry import Registry


class Game(Protocol):
    """A game of two players who move in turn and see everything.

    A state is text from which all follows: whose turn it is, what may be played, and who has won.
    """

    @property
    def rules(self) -> str:
        """Text in front of the first state. It asks for a move in brackets, such as ``[2]``."""
        ...

    def starts(self) -> Sequence[str]:
        """Return the states from which games begin; the first player moves."""
        ...

    def describe(self, state: str, /) -> str:
        """Return ``state`` as text for the player to move."""
        ...

    def moves(self, state: str, /) -> Sequence[str]:
        """Return the moves of the player to move; none where the game is over."""
        ...

    def play(self, state: str, move: str, /) -> str:
        """Return the state after ``move``, which is one of `moves`."""
        ...

    def result(self, state: str, /) -> float:
        """Return the score of the player to move where the game is over: 0 lost, 0.5 drawn, 1 won."""
        ...


class MakeGame(Protocol):
    """A registered function: makes a game from its parameters."""

    def __call__(self, params: Any, /) -> Game: ...


games: Registry[MakeGame] = Registry("game")


class PerfectPlay:
    """Values of states by search to the end of the game; each state is searched once."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self._values: dict[str, float] = {}

    def value(self, state: str) -> float:
        """Return the score that the player to move reaches if both play perfectly."""
        if state not in self._values:
            moves = self.game.moves(state)
            after = [1 - self.value(self.game.play(state, move)) for move in moves]
            self._values[state] = max(after) if after else self.game.result(state)
        return self._values[state]

    def best_moves(self, state: str) -> list[str]:
        """Return the moves that keep the value of ``state``."""
        value = self.value(state)
        return [move for move in self.game.moves(state) if 1 - self.value(self.game.play(state, move)) == value]
