"""A group-sequential test on paired differences: does a change hurt learning?

d_i is the score of the candidate minus that of the baseline with the i-th seed. Two one-sided t-tests are made at every
look, after n ∈ ``looks`` pairs, of

- "hurts by the margin": mean d ≤ −margin. Rejected, the change *does not hurt*.
- "does not hurt at all": mean d ≥ 0. Rejected, the change *hurts*.

Looking several times makes errors likelier, so the test stops at a look only where the p-value of that look is at most
one level c for all looks (Pocock, 1977), with c such that P(min_n p_n ≤ c) = α where the hypothesis just holds. The
*sequential p-value* is P(min_n p_n ≤ smallest p-value seen), under the same hypothesis. Both probabilities come from a
simulation with normal differences; they do not depend on the standard deviation, because the t statistic does not.

So a change that hurts by the margin or more is accepted with probability α at most, and a change that hurts nothing is
called harmful with its own probability α at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SIMULATIONS = 100_000
Outcome = Literal["identical", "does not hurt", "hurts", "undecided"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SequentialTest:
    """A plan of `decide`.

    Attributes:
        margin: the smallest drop of the score that counts as harm.
        alpha: maximum probability of accepting a change that hurts by the margin.
        harm_alpha: maximum probability of calling a change harmful that is not. Several tasks, one of which is enough
            to reject the change, share it.
        looks: numbers of pairs after which it may stop, rising, from 2.
    """

    margin: float
    alpha: float = 0.05
    harm_alpha: float = 0.05
    looks: tuple[int, ...] = (3, 4, 5, 6, 7, 8)

    @property
    def levels(self) -> tuple[float, float]:
        """The levels c of a single look, for "hurts by the margin" and for "does not hurt at all"."""
        return _level(self.looks, self.alpha), _level(self.looks, self.harm_alpha)


@dataclass(frozen=True)
class Verdict:
    """What the pairs so far say.

    Attributes:
        outcome: "identical" if all pairs of runs are equal in every number; "undecided" until a look stops the test.
        pairs: pairs used.
        difference: mean of candidate − baseline.
        deviation: standard deviation of the differences; 0 with fewer than two pairs.
        p: sequential p-value of "hurts by the margin": small where the change does not hurt.
        p_harm: sequential p-value of "does not hurt at all": small where it hurts.
    """

    outcome: Outcome
    pairs: int
    difference: float
    deviation: float
    p: float
    p_harm: float

    @property
    def final(self) -> bool:
        """Whether more pairs would not change it."""
        return self.outcome != "undecided"


def decide(differences: Sequence[float], test: SequentialTest, identical: bool = False) -> Verdict:
    """Return what ``differences``, in the order of their seeds, say; those after the look that stops are not used.

    Args:
        identical: every pair of runs is equal in every number, so that the difference is 0 for every seed.
    """
    if identical and differences:
        return Verdict("identical", len(differences), 0.0, 0.0, p=0.0, p_harm=1.0)
    (accept, reject), smallest = test.levels, [1.0, 1.0]
    outcome: Outcome = "undecided"
    used = len(differences)
    for look in (n for n in test.looks if n <= len(differences) and outcome == "undecided"):
        found = np.asarray(differences[:look])
        not_inferior, harm = (float(p[0]) for p in _p_values(found[None], test.margin))
        smallest = [min(smallest[0], not_inferior), min(smallest[1], harm)]
        if not_inferior <= accept or harm <= reject:
            outcome, used = ("does not hurt" if not_inferior <= accept else "hurts"), look
    seen = np.asarray(differences[:used])
    deviation = float(seen.std(ddof=1)) if used > 1 else 0.0
    return Verdict(
        outcome,
        used,
        float(seen.mean()) if used else 0.0,
        deviation,
        p=_sequential_p(smallest[0], test),
        p_harm=_sequential_p(smallest[1], test),
    )


def acceptance(test: SequentialTest, difference: float, deviation: float, simulations: int = 20_000) -> float:
    """Return the probability that the test accepts a change whose differences are normal with these moments.

    With ``difference=0`` it is the power, with ``difference=-test.margin`` the probability of accepting what hurts.
    """
    if deviation == 0:
        return float(difference > -test.margin)
    accept, reject = test.levels
    sample = np.random.default_rng(1).normal(difference, deviation, (simulations, test.looks[-1]))
    accepted, running = np.zeros(simulations, bool), np.ones(simulations, bool)
    for look in test.looks:
        not_inferior, harm = _p_values(sample[:, :look], test.margin)
        accepted |= running & (not_inferior <= accept)
        running &= (not_inferior > accept) & (harm > reject)
    return float(accepted.mean())


def pairs_needed(test: SequentialTest, deviation: float, power: float = 0.8) -> int:
    """Return about how many pairs a single look needs to accept, with ``power``, a change that changes nothing.

    Source: the normal formula for a one-sided test with Guenther's correction for an estimated deviation (Guenther,
    1981, "Sample size formulas for normal theory t tests").
    """
    alpha, beta = (NormalDist().inv_cdf(p) for p in (1 - test.alpha, power))
    return max(2, math.ceil(((alpha + beta) * deviation / test.margin) ** 2 + alpha**2 / 2))


def student_t_cdf(t: Floats, freedom: int) -> Floats:
    """Return P(T ≤ t) of Student's t distribution with an integer number of degrees of freedom.

    Source: finite sums, Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    theta = np.arctan(np.asarray(t) / math.sqrt(freedom))
    cosine, sine = np.cos(theta), np.sin(theta)
    odd = freedom % 2
    term = cosine if odd else np.ones_like(theta)
    total = term.copy() if freedom > 1 else np.zeros_like(theta)
    for k in range(2 + odd, freedom - 1, 2):
        term = term * cosine**2 * (k - 1) / k
        total = total + term
    central = (theta + sine * total) * 2 / math.pi if odd else sine * total
    return np.asarray((1 + central) / 2, np.float64)


def _p_values(sample: Floats, margin: float) -> tuple[Floats, Floats]:
    """Return the p-values of both hypotheses of each row of ``sample``, ``[rows, n]``."""
    n = sample.shape[1]
    mean, error = sample.mean(1), sample.std(1, ddof=1) / math.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        above = np.nan_to_num((mean + margin) / error, nan=0.0, posinf=np.inf, neginf=-np.inf)
        below = np.nan_to_num(mean / error, nan=0.0, posinf=np.inf, neginf=-np.inf)
    return 1 - student_t_cdf(above, n - 1), student_t_cdf(below, n - 1)


@cache
def _level(looks: tuple[int, ...], alpha: float) -> float:
    return float(np.quantile(_smallest_p_values(looks), alpha))


@cache
def _smallest_p_values(looks: tuple[int, ...]) -> Floats:
    """Return the smallest p-value over all looks of simulated tests, where the hypothesis just holds; sorted."""
    sample = np.random.default_rng(0).standard_normal((SIMULATIONS, looks[-1]))
    smallest = np.ones(SIMULATIONS)
    for look in looks:
        smallest = np.minimum(smallest, _p_values(sample[:, :look], 0.0)[1])
    return np.sort(smallest)


def _sequential_p(smallest: float, test: SequentialTest) -> float:
    return float(np.searchsorted(_smallest_p_values(test.looks), smallest, side="right")) / SIMULATIONS
