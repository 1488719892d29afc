"""Why episodes are invalid, counted by kind."""

from __future__ import annotations

import re

MOST_KINDS = 1000
"""Further kinds are not counted: reasons that quote what a model wrote all differ."""


class Reasons:
    """Reasons with their counts; those that differ in numbers alone, such as that of the episode, are of one kind."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def add(self, reason: str) -> bool:
        """Count ``reason``; return whether it is the first of its kind."""
        kind = re.sub(r"\d+", "#", reason)
        is_new = kind not in self._counts
        if is_new and len(self._counts) >= MOST_KINDS:
            return False
        self._first.setdefault(kind, reason)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return is_new

    def most_common(self, n: int) -> list[tuple[str, int]]:
        """Return the first reason of the ``n`` most frequent kinds, and how many there were of the kind."""
        kinds = sorted(self._counts, key=lambda kind: -self._counts[kind])[:n]
        return [(self._first[kind], self._counts[kind]) for kind in kinds]
