"""Blocks: boxes of global tensors, in files and in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SavedBlock = tuple[Sequence[Any], str, tuple[int, ...]]
"""A block in a manifest: its location in a file, in terms of the format; key of the global tensor; offset in that."""


def overlap(
    start: Sequence[int], size: Sequence[int], other_start: Sequence[int], other_size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return the slices of two boxes where they overlap, within the first and within the second; None if nowhere."""
    low = [max(a, b) for a, b in zip(start, other_start)]
    high = [min(a + n, b + m) for a, n, b, m in zip(start, size, other_start, other_size)]
    if any(a >= b for a, b in zip(low, high)):
        return None
    first = tuple(slice(a - origin, b - origin) for a, b, origin in zip(low, high, start))
    second = tuple(slice(a - origin, b - origin) for a, b, origin in zip(low, high, other_start))
    return first, second
