"""Retention of checkpoints: the ones to delete after a new one."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def outdated(steps: Collection[int], scores: Mapping[int, float], newest: int, keep: int | None) -> set[int]:
    """Return the steps whose checkpoints are no longer kept.

    Args:
        steps: of the complete checkpoints. Those after ``newest`` stay: they are of a run that went further once.
        scores: how good checkpoints are, larger being better, where that is known.
        keep: newest checkpoints that stay, in addition to the best one; None: all.
    """
    if keep is None:
        return set()
    until_now = sorted(step for step in steps if step <= newest)
    return set(until_now[:-keep]) - {best(scores)}


def best(scores: Mapping[int, float]) -> int | None:
    """Return the step with the highest score, the latest of equal ones."""
    return max(scores, key=lambda step: (scores[step], step), default=None)
