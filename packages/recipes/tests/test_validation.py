"""Validation metrics against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore.controller import LocalExecutor
from rlcore.engines import RewardResult
from rlcore.engines.episode import PromptSample
from rlcore_recipes.step.logged_rows import COLUMNS
from rlcore_recipes.step.validation import majority_score, validate_prompts, validation_metrics


def answers(groups: dict[tuple[str, int], list[RewardResult]]) -> Batch:
    rows = [(source, group, result) for (source, group), results in groups.items() for result in results]
    return Batch(
        {
            "group": torch.tensor([group for _, group, _ in rows]),
            "score": torch.tensor([result.score for _, _, result in rows]),
            "reward_result": [result for _, _, result in rows],
            "response_length": torch.tensor([3] * len(rows)),
            "data_source": [source for source, _, _ in rows],
            "finish_reason": ["stop"] * (len(rows) - 1) + ["length"],
            "tokens": Jagged.from_list([[group, 7, 99] for _, group, _ in rows], torch.int64),
            "prompt_length": torch.tensor([2] * len(rows)),
            "completion": [f"a{index}" for index in range(len(rows))],
            "ground_truth": [None] * len(rows),
        }
    )


def result(score: float, answer: str | None = None, **extras: float) -> RewardResult:
    return RewardResult(score, extras, answer)


def failed(score: float) -> RewardResult:
    return RewardResult(score, error="timeout")


def test_mean_best_worst_and_majority_per_source() -> None:
    batch = answers(
        {
            ("a", 0): [result(1, "4"), result(0, "5"), result(1, "4")],
            ("a", 1): [result(0, "7"), result(0, "7"), result(1, "8")],
            ("b", 2): [result(0.5), result(0.25), result(0)],
        }
    )
    found = validation_metrics(batch)
    assert found["val-core/a/reward/mean@3"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["val-core/a/reward/best@3"] == 1.0
    assert found["val-core/a/reward/worst@3"] == 0.0
    assert found["val-core/a/reward/maj@3"] == 0.5
    assert found["val-core/b/reward/mean@3"] == pytest.approx(0.25)
    assert found["val-core/b/reward/best@3"] == 0.5
    assert "val-core/b/reward/maj@3" not in found
    assert found["val-aux/response_length/mean"] == 3.0
    assert found["val-aux/response_length/clip_ratio"] == pytest.approx(1 / 9)


def test_one_completion_has_a_mean_only() -> None:
    found = validation_metrics(answers({("a", 0): [result(1, "4", format=1)], ("a", 1): [result(0, None, format=0)]}))
    assert found["val-core/a/reward/mean@1"] == 0.5
    assert found["val-aux/a/format/mean@1"] == 0.5
    assert not [name for name in found if "best" in name or "maj" in name]


def test_a_failed_reward_counts_and_lacks_extras() -> None:
    failed = RewardResult(0.0, error="timeout")
    found = validation_metrics(answers({("a", 0): [result(1, format=1)], ("a", 1): [failed]}))
    assert found["val-core/a/reward/mean@1"] == 0.5
    assert found["val-aux/a/format/mean@1"] == 1.0
    assert found["val-aux/reward_error_ratio"] == 0.5


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([(1, "x"), (0, "y"), (0, "y")], 0),
        ([(1, "x"), (0, "y")], 1),  # the first of equals
        ([(0, None), (0, None), (1, "x")], 1),  # who reads nothing does not vote
        ([(0, None), (0, None)], 0),
    ],
)
def test_majority(votes: list[tuple[float, str | None]], expected: float) -> None:
    assert majority_score([result(score, answer) for score, answer in votes]) == expected


def test_batches_and_logged_completions() -> None:
    prompts = [PromptSample([1], [], None, "a", index=i, position=i) for i in range(5)]
    asked: list[int] = []

    def answer(part: Sequence[PromptSample]) -> Batch:
        asked.append(len(part))
        return answers({("a", prompt.position): [failed(float(prompt.position))] for prompt in part})

    session: Any = SimpleNamespace(
        config=SimpleNamespace(data=SimpleNamespace(val_batch_size=2), trainer=SimpleNamespace(log_val_generations=3)),
        val_prompts=prompts,
        executor=LocalExecutor(),
        tokenizer=SimpleNamespace(decode=lambda tokens, **options: str(tokens)),
    )
    outcome = validate_prompts(session, answer)
    assert asked == [2, 2, 1]
    assert outcome.metrics["val-core/a/reward/mean@1"] == 2.0
    assert outcome.columns == COLUMNS
    assert len(outcome.rows) == 3
    assert {row[-1] for row in outcome.rows} == {"timeout"}, "the error of a reward that failed"
    again = validate_prompts(session, answer)
    assert [row[0] for row in again.rows] == [row[0] for row in outcome.rows]
    shown = {f"[{prompt.position}, 7]" for prompt in prompts}
    assert {row[0] for row in outcome.rows} < shown, "the tokens of the prompt alone, decoded"
