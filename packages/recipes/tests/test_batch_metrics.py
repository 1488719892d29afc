"""Numbers that describe a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines import RewardResult
from rlcore_recipes.step.histograms import batch_histograms, histogram
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


def test_histograms_have_every_finite_value_of_trained_tokens() -> None:
    found = batch_histograms(batch())
    assert found.keys() == {"response_length", "prompt_length", "critic/score", "critic/advantages"}
    advantages = found["critic/advantages"]  # 1 1 -1 2 2 2 0
    expected, edges = np.histogram([1, 1, -1, 2, 2, 2, 0], bins=64)
    assert advantages.counts == tuple(expected)
    assert advantages.edges == pytest.approx(tuple(edges))
    prompts = found["prompt_length"]  # all are 1
    assert (sum(prompts.counts), prompts.edges[0], prompts.edges[-1]) == (4, 0.5, 1.5)
    ratios = batch().with_columns(
        old_logprobs=batch().jagged(torch.full((11,), -1.0)), rollout_logprobs=batch().jagged(torch.full((11,), -2.0))
    )
    ratio = batch_histograms(ratios)["rollout/ratio"]
    assert (ratio.edges[0] + ratio.edges[-1]) / 2 == pytest.approx(math.e, rel=1e-5)
    assert histogram(torch.tensor([math.nan, math.inf, 1.0])).counts == (*[0] * 32, 1, *[0] * 31)
    assert histogram(torch.tensor([math.nan])) is None
