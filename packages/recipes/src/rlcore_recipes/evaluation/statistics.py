"""Estimates over prompts, and their confidence intervals.

A prompt is one observation, however many completions it has: the completions of a prompt are not independent of each
other. With per-prompt values x_1 … x_N:

- **pass@k** of a prompt with c of n passing completions is 1 - C(n-c, k) / C(n, k), the share of subsets of k that hold
  a passing one (Chen et al., 2021, https://arxiv.org/abs/2107.03374, equation 1).
- **mean@n** is the mean of the n scores.
- **maj@k** is the score of the most frequent answer among k completions (`majority_score`), averaged over the n // k
  disjoint runs of k consecutive completions.
- **Interval**: mean ± z s / √N with the sample standard deviation s (Miller, 2024, https://arxiv.org/abs/2411.00640),
  none if all x are equal; that of pass@k ends at 0 and 1. Where every x is 0 or 1, Wilson's score interval (Wilson,
  1927), which has a width also if all are equal.
- **Difference** of two models: the same normal interval over the per-prompt differences of the prompts that both
  answered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, stdev

from rlcore.engines import RewardResult
from rlcore_recipes.step.validation import majority_score


@dataclass(frozen=True)
class Estimate:
    """A mean over ``prompts`` prompts and its confidence interval; None where the values do not give one."""

    value: float
    low: float | None
    high: float | None
    prompts: int


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Return the share of subsets of ``k`` out of ``n`` completions that hold one of the ``passed``."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} completions of a prompt, and there are {n}")
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def majority_at_k(results: Sequence[RewardResult], k: int) -> float:
    """Return the mean score of the majority's answer over the disjoint runs of ``k`` completions."""
    starts = range(0, len(results) - k + 1, k)
    return fmean(majority_score(results[start : start + k]) for start in starts)


def prompt_values(
    results: Sequence[RewardResult], ks: Sequence[int], pass_score: float, votes: bool
) -> dict[str, float]:
    """Return the values of one prompt by metric.

    Args:
        votes: whether the reward reads answers, without which there is no majority.
    """
    n, passed = len(results), sum(result.score >= pass_score for result in results)
    found = {f"mean@{n}": fmean(result.score for result in results)}
    found |= {f"pass@{k}": pass_at_k(n, passed, k) for k in ks}
    if votes:
        found |= {f"maj@{k}": majority_at_k(results, k) for k in ks if k > 1}
    return found


def estimate(values: Sequence[float], confidence: float, bounded: bool = False) -> Estimate:
    """Return the mean of per-prompt values with its interval.

    Args:
        bounded: the values are probabilities.
    """
    n, mean, z = len(values), fmean(values), _z(confidence)
    if all(value in (0.0, 1.0) for value in values):
        center = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return Estimate(mean, max(center - half, 0.0), min(center + half, 1.0), n)
    found = _normal(values, z)
    if bounded and found.low is not None and found.high is not None:
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
    return found


def difference(before: Mapping[str, float], after: Mapping[str, float], confidence: float) -> Estimate | None:
    """Return how much higher the values ``after`` are than ``before`` on the same prompts; None if none is in both."""
    values = [after[key] - before[key] for key in after if key in before]
    return _normal(values, _z(confidence)) if values else None


def _normal(values: Sequence[float], z: float) -> Estimate:
    mean, n = fmean(values), len(values)
    if n == 1 or min(values) == max(values):
        return Estimate(mean, None, None, n)
    half = z * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
