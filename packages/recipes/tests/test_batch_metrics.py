"""Numbers that describe a batch."""

from __future__ import annotations

import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines import RewardResult
from rlcore_recipes.step.metrics import batch_metrics


def batch() -> Batch:
    lengths = torch.tensor([3, 2, 4, 2])
    mask = Jagged(torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1.0]), lengths)
    return Batch(
        {
            "tokens": Jagged(torch.arange(11), lengths),
            "loss_mask": mask,
            "token_rewards": Jagged(torch.tensor([0, -0.1, 1, 0, 0, 0, 0, 0, 2, 0, 3.0]), lengths),
            "advantages": Jagged(torch.tensor([9, 1, 1, 9, -1, 9, 2, 2, 2, 9, 0.0]), lengths),
            "score": torch.tensor([1.0, 0.0, 2.0, 2.0]),
            "group": torch.tensor([5, 5, 6, 6]),
            "prompt_length": torch.tensor([1, 1, 1, 1]),
            "response_length": torch.tensor([2, 1, 3, 1]),
            "policy_version": torch.tensor([7, 8, 5, 8]),
            "later_version_tokens": torch.tensor([0, 0, 2, 0]),
            "finish_reason": ["stop", "length", "stop", "abort"],
            "reward_result": [RewardResult(1, {"format": 1.0}), RewardResult(0, error="timeout"),
                              RewardResult(2, {"format": 0.0}), RewardResult(2, {"format": 0.5})],
        }
    )  # fmt: skip


def test_scores_rewards_advantages_and_lengths() -> None:
    found = batch_metrics(batch())
    assert found["critic/score/mean"] == 1.25
    assert (found["critic/score/max"], found["critic/score/min"]) == (2.0, 0.0)
    assert found["critic/rewards/mean"] == pytest.approx((0.9 + 0 + 2 + 3) / 4)
    # trained tokens only: 1 1 -1 2 2 2 0
    assert found["critic/advantages/mean"] == pytest.approx(1.0)
    assert found["critic/advantages/min"] == -1.0
    assert found["response_length/mean"] == 1.75
    assert found["response_length/clip_ratio"] == 0.25
    assert found["response/aborted_ratio"] == 0.25
    assert found["prompt_length/max"] == 1.0
    assert found["perf/total_num_tokens"] == 11.0
    assert "critic/values/mean" not in found


def test_reward_extras_errors_and_groups_without_spread() -> None:
    found = batch_metrics(batch())
    assert found["reward/format"] == 0.5
    assert found["reward/error_ratio"] == 0.25
    assert found["reward/equal_score_groups"] == 0.5


def test_staleness() -> None:
    found = batch_metrics(batch(), version=8)
    assert found["rollout/staleness_mean"] == 1.0
    assert found["rollout/staleness_max"] == 3.0
    assert found["rollout/later_version_ratio"] == pytest.approx(2 / 7)
    assert "rollout/staleness_max" not in batch_metrics(batch())
