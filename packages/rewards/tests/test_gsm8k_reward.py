"""Reading answers, and the reward of every gold answer of a whole GSM8K test file.

RLCORE_GSM8K_DIR may name a folder with GSM8K's own test.jsonl; without it the same checks run on generated rows of the
same form.
"""

from __future__ import annotations

import json
import os
import random
from decimal import Decimal
from pathlib import Path

import pytest

from rlcore.engines.reward import Reward, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_kit.testing.reward import RewardConformance
from rlcore_rewards.gsm8k import GSM8KOptions, GSM8KReward, read_answer, read_ground_truth


class TestGSM8KConformance(RewardConformance):
    def make(self) -> Reward:
        return GSM8KReward(GSM8KOptions(), RewardSettings())

    def cases(self) -> list[tuple[RewardSample, float]]:
        return [
            (RewardSample([], "16 - 7 = 9, 9 * 2 = 18\n#### 18", "18"), 1.0),
            (RewardSample([], "9 * 2 = 19\n#### 19", "18"), 0.0),
            (RewardSample([], "18", "18"), 0.0),
        ]


@pytest.mark.parametrize(
    ("completion", "strict", "flexible"),
    [
        ("#### 18", "18", "18"),
        ("####18", "18", "18"),
        ("so\n#### $1,234,567.50.", "1234567.5", "1234567.5"),
        ("#### -3", "-3", "-3"),
        ("#### $-3", "-3", "-3"),
        ("#### -$3", "-3", "-3"),
        ("#### .5", "0.5", "0.5"),
        ("#### 1\nno:\n#### 2", "2", "2"),
        ("#### 7 apples, 2 pears", "7", "2"),
        ("the answer is 18.", None, "18"),
        ("8-3", None, "3"),
        ("x = -3", None, "-3"),
        ("1,2,3", None, "3"),
        ("1,000", None, "1000"),
        ("### 18 apples", None, "18"),
        ("#### eighteen", None, None),
        ("#### \u0663", None, None),
        ("", None, None),
    ],
)
def test_reads_the_answer(completion: str, strict: str | None, flexible: str | None) -> None:
    assert read_answer(completion, "strict") == (None if strict is None else Decimal(strict))
    assert read_answer(completion, "flexible") == (None if flexible is None else Decimal(flexible))


def test_strict_looks_at_the_last_300_characters() -> None:
    assert read_answer("#### 18".ljust(300), "strict") == 18
    assert read_answer("#### 18".ljust(301), "strict") is None


@pytest.mark.parametrize(
    ("ground_truth", "value"),
    [("18", "18"), (18, "18"), (18.0, "18"), (" $1,000 ", "1000"), ("-2.50", "-2.5"), ("2 + 2 = 4\n#### 4", "4")],
)
def test_reads_the_ground_truth(ground_truth: object, value: str) -> None:
    assert read_ground_truth(ground_truth) == Decimal(value)


@pytest.mark.parametrize("ground_truth", [None, "", "eighteen", "1 2", "1,00", "12 apples", float("nan")])
def test_a_ground_truth_without_number_is_a_counted_failure(
    ground_truth: object, caplog: pytest.LogCaptureFixture
) -> None:
    reward = GSM8KReward(GSM8KOptions(), RewardSettings(error_score=-0.5))
    results = reward.score_batch([RewardSample([], "#### 18", ground_truth)] * 2)
    assert [result.score for result in results] == [-0.5, -0.5]
    assert results[0].error == "ground_truth"
    assert reward.stats() == {"samples": 2, "errors": 2, "errors/ground_truth": 2}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_wrong_answer_may_score_for_its_format() -> None:
    reward = GSM8KReward(GSM8KOptions(format_score=0.1), RewardSettings())
    results = reward.score_batch([RewardSample([], completion, "18") for completion in ("#### 18", "#### 19", "18")])
    assert [result.score for result in results] == [1.0, 0.1, 0.0]
    assert [result.extras["correct"] for result in results] == [1.0, 0.0, 0.0]
    assert [result.extras["answered"] for result in results] == [1.0, 1.0, 0.0]


def test_equal_answers_are_equal_strings() -> None:
    reward = GSM8KReward(GSM8KOptions(), RewardSettings())
    texts = ["18", "18.0", "18.00", "$18", "0018", "-0", "0.50", ".5", "1,000", "1000.0", "words"]
    answers = [reward.score_batch([RewardSample([], f"#### {text}", 1)])[0].answer for text in texts]
    assert answers == ["18", "18", "18", "18", "18", "0", "0.5", "0.5", "1000", "1000", None]


@pytest.mark.parametrize("text", ["," * 10**6, "1," * 500_000, "1,111" * 200_000, "-$" * 500_000, "#### " * 200_000])
@pytest.mark.timeout(10)
def test_hostile_text_takes_linear_time(text: str) -> None:
    read_answer(text, "flexible")
    read_answer(text, "strict")
    read_ground_truth(f"{text}\n#### 1")


def rows() -> list[dict[str, str]]:
    folder = os.environ.get("RLCORE_GSM8K_DIR")
    if folder:
        return [json.loads(line) for line in (Path(folder) / "test.jsonl").read_text().splitlines()]
    draw = random.Random(0)
    numbers = [draw.choice([draw.randint(-99, 999), draw.randint(1000, 9_999_999)]) for _ in range(1319)]
    return [{"answer": f"1 + 1 = <<1+1=2>>2\nIn all $<<{n}+0={n}>>{n}.\n#### {n:,}"} for n in numbers]


@pytest.mark.parametrize("method", ["strict", "flexible"])
def test_every_gold_answer_scores_1_and_with_a_wrong_number_0(method: str) -> None:
    answers = [row["answer"] for row in rows()]
    assert len(answers) == 1319
    reward = GSM8KReward(GSM8KOptions(method=method), RewardSettings())
    for truths in (answers, [answer.split("####")[1] for answer in answers]):
        right = reward.score_batch([RewardSample([], answer, truth) for answer, truth in zip(answers, truths)])
        assert [result.score for result in right] == [1.0] * len(answers)
        wrong = reward.score_batch([RewardSample([], f"{answer}1", truth) for answer, truth in zip(answers, truths)])
        assert [result.score for result in wrong] == [0.0] * len(answers)
    assert reward.stats() == {"samples": 4 * len(answers), "errors": 0}
