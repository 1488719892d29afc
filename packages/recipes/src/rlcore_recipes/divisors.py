"""Divisors of a batch size, for messages about one that does not divide it."""

from __future__ import annotations


def nearest_divisors(batch: int, size: int) -> list[int]:
    """Return the divisors of ``batch`` next to ``size``: the largest below it and the smallest above it."""
    divisors = [number for number in range(1, batch + 1) if batch % number == 0]
    return [d for d in divisors if d < size][-1:] + [d for d in divisors if d > size][:1]
