from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from rlcore.engines.reward import Reward, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_kit.testing.reward import RewardConformance
from rlcore_rewards.math import MathOptions, math_reward
from rlcore_rewards.math_answers import last_boxed


@pytest.fixture(scope="module")
def reward() -> Iterator[Reward]:
    reward = math_reward(MathOptions(), RewardSettings(workers=1, timeout_s=2, error_score=-1))
    yield reward
    reward.close()


class TestMathConformance(RewardConformance):
    def make(self) -> Reward:
        return math_reward(MathOptions(), RewardSettings(workers=1))

    def cases(self) -> list[tuple[RewardSample, float]]:
        return [
            (RewardSample([], r"Thus $x = \boxed{\frac{1}{2}}$.", "0.5"), 1.0),
            (RewardSample([], r"Thus $x = \boxed{\frac{1}{3}}$.", "0.5"), 0.0),
        ]


@pytest.mark.parametrize(
    ("completion", "truth"),
    [
        (r"$\boxed{\frac12}$", "0.5"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
        (r"\boxed{\{3,2,1\}}", r"\{1,2,3\}"),
        (r"\boxed{(1,2]}", "(1,2]"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{\boxed{2}}", "2"),
        (r"\fbox{2}", "2"),
        ("the answer is 3/4.", r"\frac{3}{4}"),
        ("first 7, then 8, so the answer is 9", "9"),
        (r"\boxed{18}", "16 - 7 = 9\n#### 18"),
        (r"\boxed{18}", r"a solution with $\boxed{18}$ in it"),
        (r"\boxed{18}", 18),
        (r"\boxed{\frac12}", ["0.25", "0.5"]),
        (r"\boxed{\text{No}}", "no"),
        (r"\boxed{$no$}", r"\mbox{No}."),
        (r"\boxed{\text{No  solution.}}", "no solution"),
        (r"\boxed{b a}", "a b"),
        (r"\boxed{true}", True),
        (r"\boxed{b \cdot a}", "ab"),
    ],
)
def test_equal_answers_score_1(reward: Reward, completion: str, truth: object) -> None:
    [result] = reward.score_batch([RewardSample([], completion, truth)])
    assert (result.score, result.error) == (1.0, None)
    assert result.extras == {"correct": 1.0, "answered": 1.0}
    assert result.answer


@pytest.mark.parametrize(
    ("completion", "truth", "answered"),
    [
        (r"\boxed{\frac13}", "0.5", 1.0),
        (r"\boxed{1} \boxed{2}", "1", 1.0),
        (r"\boxed{[1,2]}", "(1,2]", 1.0),
        (r"\boxed{on}", "No", 1.0),
        (r"\boxed{$on$}", r"\textrm{No}", 1.0),
        (r"\boxed{on the left}", "no the left", 1.0),
        (r"\boxed{\text{blue}}", r"\text{lube}", 1.0),
        (r"\boxed{1}", True, 1.0),
        (r"\boxed{3}", ["1", 2], 1.0),
        ("no idea", "2", 0.0),
        ("", "2", 0.0),
    ],
)
def test_other_answers_score_0(reward: Reward, completion: str, truth: object, answered: float) -> None:
    [result] = reward.score_batch([RewardSample([], completion, truth)])
    assert (result.score, result.error) == (0.0, None)
    assert result.extras == {"correct": 0.0, "answered": answered}


def test_may_insist_on_a_box_and_pay_for_the_format() -> None:
    reward = math_reward(MathOptions(extraction="boxed", format_score=0.1), RewardSettings(workers=1))
    results = reward.score_batch([RewardSample([], text, "2") for text in (r"\boxed{2}", r"\boxed{3}", "2")])
    reward.close()
    assert [result.score for result in results] == [1.0, 0.1, 0.0]


@pytest.mark.parametrize(
    "truth", [None, "", "####", [], ["2", ""], [["2"]], {"answer": 2}, {2}, b"2", float("nan")], ids=repr
)
def test_an_unreadable_ground_truth_is_a_failure(reward: Reward, truth: object) -> None:
    [result] = reward.score_batch([RewardSample([], r"\boxed{2}", truth)])
    assert (result.score, result.error) == (-1.0, "ground_truth")


@pytest.mark.parametrize(
    "completion",
    [r"\boxed{9^{9^{9^{9}}}}", "the answer is 9**9**9**9", r"\boxed{100000000!}", r"\boxed{\sum_{n=1}^{10^{11}} 1/n}"],
)
def test_an_endless_computation_is_cut_off(reward: Reward, completion: str) -> None:
    before = time.monotonic()
    [result] = reward.score_batch([RewardSample([], completion, "4")])
    assert (result.score, result.error) == (-1.0, "timeout")
    assert time.monotonic() - before < 10  # a start of the worker, and its 2 seconds


@pytest.mark.parametrize(
    "completion",
    [
        "1 " * 1_000_000,
        "{" * 2_000_000,
        "$" * 100_000,
        r"\boxed{" * 10_000,
        r"\boxed{" + r"\sqrt{" * 3000 + "2" + "}" * 3001,
        r"\boxed{" + r"\frac{1}{" * 500 + "2" + "}" * 501,
    ],
    ids=["numbers", "braces", "dollars", "boxes", "roots", "fractions"],
)
def test_hostile_text_costs_a_bounded_time(reward: Reward, completion: str) -> None:
    before = time.monotonic()
    [result] = reward.score_batch([RewardSample([], completion, "4")])
    assert result.score in (0.0, -1.0)
    assert time.monotonic() - before < 10


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{(-\infty, 1\}}", r"(-\infty, 1\}"),
        (r"\boxed{}", ""),
        (r"} \boxed{4} }", "4"),
        ("boxed{4}", None),
    ],
)
def test_the_last_closed_box_counts(text: str, content: str | None) -> None:
    assert last_boxed(text) == content
