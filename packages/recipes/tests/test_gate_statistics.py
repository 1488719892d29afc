"""The sequential test of the learning gate, against simulations that share nothing with it but the definition."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from rlcore_recipes.gate.sequential import SequentialTest, acceptance, decide, pairs_needed, student_t_cdf

TEST = SequentialTest(margin=0.1, alpha=0.05, harm_alpha=0.05, looks=(3, 4, 5, 6, 7, 8))
EXPERIMENTS = 1500
NOISE = 3 * math.sqrt(0.05 * 0.95 / EXPERIMENTS)
"""Three standard errors of a simulated probability of 5 %."""


def experiments(difference: Callable[[random.Random], float]) -> list[str]:
    """Return the outcomes of tests whose pairs come one after the other, as in the gate."""
    rng, outcomes = random.Random(11), []
    for _ in range(EXPERIMENTS):
        pairs = [difference(rng) for _ in range(TEST.looks[-1])]
        outcomes.append(decide(pairs, TEST).outcome)
    return outcomes


def share(outcomes: list[str], outcome: str) -> float:
    return outcomes.count(outcome) / len(outcomes)


@pytest.mark.parametrize("freedom", [1, 2, 3, 6, 7, 30])
def test_t_distribution_is_the_integral_of_its_density(freedom: int) -> None:
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    grid = np.linspace(0, 2.5, 20_001)
    density = scale * (1 + grid**2 / freedom) ** (-(freedom + 1) / 2)
    area = float(((density[1:] + density[:-1]) / 2).sum() * grid[1])
    found = student_t_cdf(np.array([2.5, -2.5, 0.0]), freedom)
    assert found == pytest.approx([0.5 + area, 0.5 - area, 0.5], abs=1e-8)


@pytest.mark.parametrize("deviation", [0.03, 0.1, 0.3])
def test_a_change_that_hurts_by_the_margin_is_accepted_with_alpha_at_most(deviation: float) -> None:
    outcomes = experiments(lambda rng: rng.gauss(-TEST.margin, deviation))
    assert share(outcomes, "does not hurt") <= TEST.alpha + NOISE


def test_the_error_holds_for_scores_that_are_shares_of_right_answers() -> None:
    """Of 256 problems with a learned share that varies by seed, which is no normal distribution."""

    def score(rng: random.Random, ability: float) -> float:
        p = rng.betavariate(40 * ability, 40 * (1 - ability))
        return sum(rng.random() < p for _ in range(32)) / 32

    outcomes = experiments(lambda rng: score(rng, 0.8) - score(rng, 0.9))
    assert share(outcomes, "does not hurt") <= TEST.alpha + NOISE


def test_a_change_that_hurts_nothing_is_called_harmful_with_alpha_at_most_and_accepted_with_the_stated_power() -> None:
    for deviation in (0.05, 0.12):
        outcomes = experiments(lambda rng, deviation=deviation: rng.gauss(0.0, deviation))  # type: ignore[misc]
        assert share(outcomes, "hurts") <= TEST.harm_alpha + NOISE
        stated = acceptance(TEST, 0.0, deviation)
        assert share(outcomes, "does not hurt") == pytest.approx(stated, abs=3 * math.sqrt(0.25 / EXPERIMENTS))
    assert acceptance(TEST, 0.0, 0.05) > 0.98 > 0.6 > acceptance(TEST, 0.0, 0.12)


def test_a_change_that_hurts_much_is_called_harmful() -> None:
    outcomes = experiments(lambda rng: rng.gauss(-0.3, 0.1))
    assert share(outcomes, "hurts") > 0.99


def test_looking_at_every_pair_with_the_level_of_one_look_would_err_more_often() -> None:
    """The simulation sees the error that the test's levels prevent."""
    rng, wrong = np.random.default_rng(5), 0
    for row in rng.normal(-TEST.margin, 0.1, (500, TEST.looks[-1])).tolist():
        naive = (decide(row[:look], SequentialTest(0.1, looks=(look,))) for look in TEST.looks)
        wrong += any(verdict.outcome == "does not hurt" for verdict in naive)
    assert wrong / 500 > 0.1


def test_sequential_p_values_are_valid() -> None:
    rng = random.Random(3)
    found = [decide([rng.gauss(-TEST.margin, 0.2) for _ in range(8)], TEST).p for _ in range(EXPERIMENTS)]
    for level in (0.01, 0.05, 0.2):
        assert sum(p <= level for p in found) / EXPERIMENTS <= level + 3 * math.sqrt(level / EXPERIMENTS)


def test_outcomes_and_the_pairs_that_they_use() -> None:
    accepted = decide([0.01, -0.02, 0.0, -5.0], TEST)
    assert (accepted.outcome, accepted.pairs) == ("does not hurt", 3)  # the fourth pair comes after the decision
    assert accepted.p <= 0.05 < accepted.p_harm
    refused = decide([-0.2, -0.22, -0.19], TEST)
    assert (refused.outcome, refused.pairs) == ("hurts", 3)
    assert refused.p_harm <= 0.05 < refused.p
    unclear = decide([0.3, -0.3, 0.1], TEST)
    assert (unclear.outcome, unclear.final) == ("undecided", False)
    assert decide([0.0, 0.0, 0.0], TEST).outcome == "does not hurt"
    assert decide([0.0], TEST, identical=True).outcome == "identical"
    assert decide([], TEST, identical=True).outcome == "undecided"
    assert decide([-0.2, -0.2, -0.2], TEST).outcome == "hurts"  # differences without any deviation


def test_several_tasks_share_the_probability_of_calling_one_harmful() -> None:
    pairs = [-0.06, -0.09, -0.03]
    assert decide(pairs, TEST).outcome == "undecided"
    few = [-0.15, -0.17, -0.135]
    assert decide(few, TEST).outcome == "hurts"
    assert decide(few, SequentialTest(0.1, harm_alpha=0.0005)).outcome == "undecided"


@pytest.mark.parametrize("deviation", [0.06, 0.1, 0.16])
def test_pairs_needed_have_about_the_power_that_is_asked_for(deviation: float) -> None:
    pairs = pairs_needed(TEST, deviation)
    assert acceptance(SequentialTest(0.1, looks=(pairs,)), 0.0, deviation) > 0.77
    assert acceptance(SequentialTest(0.1, looks=(pairs - 1,)), 0.0, deviation) < 0.83
