"""Statistics of evaluations, against enumeration of all subsets and against exact small cases."""

from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import fmean

import pytest

from rlcore.engines import RewardResult
from rlcore_recipes.evaluation.statistics import (
    difference,
    estimate,
    majority_at_k,
    pass_at_k,
    prompt_values,
)


def results(*pairs: tuple[float, str | None]) -> list[RewardResult]:
    return [RewardResult(score, answer=answer) for score, answer in pairs]


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_passing_completion(n: int) -> None:
    for passed in range(n + 1):
        outcomes = [number < passed for number in range(n)]
        for k in range(1, n + 1):
            expected = fmean(any(subset) for subset in combinations(outcomes, k))
            assert pass_at_k(n, passed, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_needs_k_completions() -> None:
    with pytest.raises(ValueError, match="pass@4 needs at least 4 completions of a prompt, and there are 3"):
        pass_at_k(3, 1, 4)


def test_the_majority_votes_in_disjoint_runs() -> None:
    made = results((1, "a"), (0, "b"), (0, "b"), (1, "a"), (1, "a"), (0, None), (0, "c"))
    assert majority_at_k(made, 7) == 1.0  # three a, two b
    assert majority_at_k(made, 3) == fmean([0.0, 1.0])  # b of (a, b, b), a of (a, a, none); the seventh is left out
    assert majority_at_k(made, 2) == fmean([1.0, 0.0, 1.0])  # the first of equals
    assert majority_at_k(results((0.5, None), (0.7, None)), 2) == 0.5


def test_values_of_a_prompt() -> None:
    made = results((0.2, "a"), (1.0, "b"), (0.2, "a"), (0.9, "c"))
    assert prompt_values(made, [1, 2, 4], pass_score=0.9, votes=True) == {
        "mean@4": pytest.approx(0.575),
        "pass@1": pytest.approx(0.5),
        "pass@2": pytest.approx(5 / 6),
        "pass@4": 1.0,
        "maj@2": pytest.approx(0.2),
        "maj@4": pytest.approx(0.2),
    }
    assert "maj@2" not in prompt_values(made, [2], pass_score=1.0, votes=False)


def test_intervals_of_zeros_and_ones_are_wilsons() -> None:
    """Bounds are the p whose distance from the observed share is z standard deviations under p itself."""
    for passed, n in ((0, 20), (7, 20), (20, 20), (1, 1)):
        found = estimate([1.0] * passed + [0.0] * (n - passed), 0.95)
        share = passed / n
        assert found.value == share
        for bound in (found.low, found.high):
            assert bound is not None
            if 0 < bound < 1:
                assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, rel=1e-5)
        assert found.high > found.low  # type: ignore[operator]


def test_other_intervals_cover_the_mean_as_often_as_they_say() -> None:
    source, covered = random.Random(0), 0
    for _ in range(400):
        found = estimate([source.betavariate(2, 5) for _ in range(60)], 0.9)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 2 / 7 <= found.high
    assert abs(covered / 400 - 0.9) < 3 * math.sqrt(0.09 / 400)


def test_one_prompt_has_no_normal_interval() -> None:
    found = estimate([0.25], 0.95)
    assert (found.value, found.low, found.high, found.prompts) == (0.25, None, None, 1)


def test_intervals_end_where_they_must() -> None:
    found = estimate([0.0, 0.25, 0.0], 0.95, bounded=True)
    assert found.low == 0.0
    assert estimate([0.0, 0.25, 0.0], 0.95).low < 0  # type: ignore[operator]  # a score may be negative
    assert estimate([0.5, 0.5], 0.95).low is None, "equal values say nothing about how far others are"


def test_differences_are_paired_by_prompt() -> None:
    before = {"a": 0.0, "b": 1.0, "c": 0.5, "only here": 1.0}
    after = {"a": 0.25, "b": 1.0, "c": 1.0, "only there": 0.0}
    found = difference(before, after, 0.95)
    assert found is not None
    assert (found.value, found.prompts) == (0.25, 3)
    half = 1.959964 * 0.25 / math.sqrt(3)  # differences 0.25, 0, 0.5 have the standard deviation 0.25
    assert found.low == pytest.approx(0.25 - half, rel=1e-6)
    assert found.high == pytest.approx(0.25 + half, rel=1e-6)
    assert difference({"a": 1.0}, {"b": 1.0}, 0.95) is None
