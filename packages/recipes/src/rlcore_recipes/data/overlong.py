"""Prompts that are longer than allowed: left out, cut, or an error."""

from __future__ import annotations

from collections.abc import Sequence

from rlcore.errors import DataError
from rlcore_recipes.data.settings import DataSettings


def cut_to(tokens: list[int], length: int, how: str) -> list[int]:
    """Return ``tokens``, cut to ``length`` as verl's ``data.truncation`` does.

    Args:
        how: where tokens are lost: ``left`` keeps the end, ``right`` the beginning, ``middle`` the first
            ``length // 2`` and as many of the last as fit.
    """
    excess = len(tokens) - length
    if excess <= 0:
        return tokens
    start = {"left": 0, "middle": length // 2, "right": length}[how]
    return tokens[:start] + tokens[start + excess :]


class Lengths:
    """The lengths of the prompts of one file.

    Attributes:
        rows: prompts so far.
        too_long: those of them that are longer than allowed.
    """

    def __init__(self) -> None:
        self.rows = self.too_long = 0
        self._first: tuple[int, int] | None = None  # row and length of the first that is too long
        self._shortest: int | None = None

    def add(self, prompts: Sequence[Sequence[int]], settings: DataSettings) -> list[int]:
        """Count more prompts; return the numbers among ``prompts`` of those that are used."""
        used = []
        for number, tokens in enumerate(prompts):
            fits = len(tokens) <= settings.max_prompt_length
            if not fits:
                self.too_long += 1
                self._first = self._first or (self.rows + number, len(tokens))
            if fits or settings.overlong_prompts in ("left", "right", "middle"):
                used.append(number)
        self.rows += len(prompts)
        self._shortest = min([*map(len, prompts), *([] if self._shortest is None else [self._shortest])])
        return used

    def check(self, settings: DataSettings, file: str) -> None:
        """Check that prompts are left once all were added.

        Raises:
            DataError: there are none, or there are some that are too long and those are an error.
        """
        if self._first is not None and settings.overlong_prompts == "error":
            row, length = self._first
            raise DataError(
                f"{file}, row {row}: the prompt has {length} tokens, more than "
                f"data.max_prompt_length={settings.max_prompt_length} ({self.too_long} of {self.rows} rows do); raise "
                "it, or set data.overlong_prompts to filter (leave them out), or to left, right or middle (cut them)"
            )
        if settings.overlong_prompts == "filter" and self.too_long == self.rows:
            raise DataError(
                f"none of the {self.rows} prompts of {file} fits data.max_prompt_length={settings.max_prompt_length}: "
                f"the shortest has {self._shortest} tokens"
            )
