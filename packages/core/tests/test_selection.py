"""Sample selectors against loops."""

from __future__ import annotations

import math
import random

import pytest
import torch
from pydantic import ValidationError

from rlcore.algorithms import sample_selectors
from rlcore.algorithms.selection import rank_in_group


def weights(name: str, scores: list[float], group: list[int], **params: float) -> list[float]:
    entry = sample_selectors.get(name)
    result = entry.function(torch.tensor(scores), torch.tensor(group, dtype=torch.int64), entry.params(**params))
    assert result.dtype == torch.float32
    return result.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_selectors(seed: int) -> None:
    rng = random.Random(seed)
    group = [rng.choice([4, 9, 2, 7]) for _ in range(11)]
    scores = [rng.choice([0.0, 0.25, 1.0]) for _ in group]
    rows = range(len(scores))

    def place(row: int, among: list[int]) -> int:
        return sorted(among, key=lambda other: (-scores[other], other)).index(row)

    mates = [[other for other in rows if group[other] == group[row]] for row in rows]
    assert rank_in_group(torch.tensor(scores), torch.tensor(group)).tolist() == [place(r, mates[r]) for r in rows]
    expected = [float(place(row, mates[row]) < 2 and scores[row] >= 0.25) for row in rows]
    assert weights("best", scores, group, k=2, min_score=0.25) == expected
    assert weights("threshold", scores, group) == [float(score == 1) for score in scores]
    kept = weights("top-fraction", scores, group, fraction=0.3)
    assert kept == [float(place(row, list(rows)) < 4) for row in rows]  # 3.3 samples
    found = weights("exponential", scores, group, beta=0.5)
    for row in rows:
        total = sum(math.exp(scores[other] / 0.5) for other in mates[row])
        assert found[row] == pytest.approx(len(mates[row]) * math.exp(scores[row] / 0.5) / total, rel=1e-6)


def test_exponential_weights_at_extreme_scores() -> None:
    """Neither an overflow nor 0/0; towards β = 0 the best of a prompt has all the weight, and a bound holds."""
    assert weights("exponential", [3e38, -3e38, 0.0], [1, 1, 1], max_weight=math.inf) == [3.0, 0.0, 0.0]
    assert weights("exponential", [0.5, 0.4], [0, 0], beta=1e-9) == [2.0, 0.0]
    assert weights("exponential", [1e6] * 4, [5] * 4) == [1.0] * 4
    assert weights("exponential", [100.0, 0.0, 0.0, 0.0], [5] * 4, max_weight=1.5)[0] == 1.5


def test_a_fraction_is_not_rounded_up_by_a_rounding_error() -> None:
    assert sum(weights("top-fraction", [float(i) for i in range(30)], [0] * 30, fraction=0.1)) == 3


@pytest.mark.parametrize("name", ["best", "threshold", "top-fraction", "exponential"])
def test_empty_batch(name: str) -> None:
    assert weights(name, [], []) == []


def test_ranges_of_parameters() -> None:
    for name, params in (("best", {"k": 0}), ("top-fraction", {"fraction": 0}), ("exponential", {"beta": 0})):
        with pytest.raises(ValidationError):
            sample_selectors.get(name).params(**params)
