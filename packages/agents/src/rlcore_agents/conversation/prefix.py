"""Common beginnings of tokens and of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many leading elements two sequences share."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(index for index in range(length) if first[index] != second[index])
