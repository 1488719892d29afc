"""Tic-tac-toe. With perfect play every opening is a draw."""

from __future__ import annotations

from collections.abc import Sequence

from rlcore.config.registry import NoParams
from rlcore_recipes.games.game import Game, games

EMPTY = "." * 9
LINES = ("012", "345", "678", "036", "147", "258", "048", "246")


class TicTacToe(Game):
    """The game; a state is nine characters, row by row: ``x`` (first player), ``o``, or ``.`` for a free square."""

    rules = (
        "Two players, x and o, put their marks on the squares 1 to 9 of a board of three by three. Who has three in a "
        "row, column or diagonal wins. Answer with a free square in brackets: [5]"
    )

    def starts(self) -> Sequence[str]:
        return [EMPTY]

    def describe(self, state: str) -> str:
        rows = "\n".join(state[row : row + 3] for row in (0, 3, 6))
        return f"{rows}\nYou play {_player(state)}."

    def moves(self, state: str) -> Sequence[str]:
        return [] if _complete(state) else [str(square + 1) for square, mark in enumerate(state) if mark == "."]

    def play(self, state: str, move: str) -> str:
        square = int(move) - 1
        return state[:square] + _player(state) + state[square + 1 :]

    def result(self, state: str) -> float:
        return 0.0 if _complete(state) else 0.5


@games.register("tic_tac_toe")
def tic_tac_toe(params: NoParams) -> Game:
    """Make tic-tac-toe: three in a row on a board of three by three."""
    return TicTacToe()


def _player(state: str) -> str:
    return "x" if state.count("x") == state.count("o") else "o"


def _complete(state: str) -> bool:
    """Return whether a player, who has just moved, has three in a line."""
    return any(len({state[int(square)] for square in line}) == 1 and state[int(line[0])] != "." for line in LINES)
