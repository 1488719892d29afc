"""Sampling filters against loops."""

from __future__ import annotations

import random

import pytest
import torch
from pydantic import ValidationError

from rlcore.algorithms import sampling_filters


def kept(name: str, scores: list[float], group: list[int], **params: float) -> list[bool]:
    entry = sampling_filters.get(name)
    result = entry.function(torch.tensor(scores), torch.tensor(group), entry.params(**params))
    assert result.dtype == torch.bool
    return result.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_filters(seed: int) -> None:
    rng = random.Random(seed)
    group = [rng.choice([4, 9, 2]) for _ in range(10)]
    scores = [rng.choice([0.0, 0.5, 1.0]) if g != 2 else 0.1 for g in group]
    members = [[s for s, other in zip(scores, group) if other == g] for g in group]
    assert kept("nonzero-spread", scores, group) == [len(set(m)) > 1 for m in members]
    assert kept("mean-score", scores, group, low=0.2, high=0.7) == [0.2 < sum(m) / len(m) < 0.7 for m in members]


def test_empty_batch() -> None:
    assert kept("nonzero-spread", [], []) == []


def test_bounds_must_be_ordered() -> None:
    with pytest.raises(ValidationError, match="must be below"):
        sampling_filters.get("mean-score").params(low=0.5, high=0.5)
