"""The rules by which completions are kept, each counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlcore.algorithms import sample_selectors
from rlcore.batch import Batch
from rlcore.config.registry import NoParams
from rlcore.engines import RewardResult
from rlcore.errors import BatchError
from rlcore_recipes.settings.selection import RaftAlgorithmSettings
from rlcore_recipes.step.selection import sample_weights

# prompt, score, text, reason of the end, error of the reward
ROWS: list[tuple[int, float, str, str, str | None]] = [
    (1, 1.0, "a", "stop", None),
    (1, 1.0, "a ", "stop", None),  # a duplicate
    (1, 1.0, "b", "stop", None),
    (1, 1.0, "c", "stop", None),  # one too many
    (1, 0.0, "d", "stop", None),  # wrong
    (2, 1.0, "a", "stop", None),  # of another prompt
    (2, 1.0, "e", "length", None),
    (2, 1.0, "f", "abort", None),
    (2, 1.0, "g", "stop", "timeout"),  # the configured score of failures, which is high
    (3, 0.0, "h", "stop", None),
]


def selected(**selection: Any) -> tuple[list[float], dict[str, float]]:
    group, scores, texts, reasons, errors = zip(*ROWS)
    batch = Batch(
        {
            "group": torch.tensor(group),
            "score": torch.tensor(scores),
            "completion": list(texts),
            "finish_reason": list(reasons),
            "reward_result": [RewardResult(score, error=error) for score, error in zip(scores, errors)],
            "response_length": torch.ones(len(ROWS), dtype=torch.int64),
        }
    )
    settings = {"selector": "threshold", "max_per_prompt": 2, **selection}
    weights, metrics = sample_weights(batch, RaftAlgorithmSettings(selection=settings), 8)
    return weights.tolist(), metrics.to_dict()


def test_every_rule_leaves_out_and_counts() -> None:
    weights, counts = selected()
    assert weights == [1, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    names = ("samples", "failed", "truncated", "duplicates", "rejected", "surplus", "kept")
    assert [counts[name] for name in names] == [10, 1, 2, 1, 2, 1, 3]
    assert counts["prompts_kept"] == pytest.approx(2 / 3)
    assert counts["kept_score"] == 1


def test_rules_that_are_off() -> None:
    weights, counts = selected(deduplicate=False, max_per_prompt=None, keep_truncated=True)
    assert weights == [1, 1, 1, 1, 0, 1, 1, 0, 0, 0]  # an aborted completion is no completion
    assert (counts["duplicates"], counts["surplus"], counts["truncated"]) == (0, 0, 1)


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "with NaN or infinity"), (None, "of shape \\[3\\]")])
def test_a_selector_that_gives_no_weights_is_named(
    monkeypatch: pytest.MonkeyPatch, value: float | None, what: str
) -> None:
    monkeypatch.setattr(sample_selectors, "_entries", dict(sample_selectors._entries))

    @sample_selectors.register("mine")
    def mine(scores: torch.Tensor, group: torch.Tensor, params: NoParams) -> torch.Tensor:
        return torch.ones(3) if value is None else torch.full_like(scores, value)

    with pytest.raises(BatchError, match=f"sample selector 'mine' must return one finite weight.*{what}"):
        selected(selector="mine")
