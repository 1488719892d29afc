"""Scores that cannot be used cost the sample they belong to, and no other."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore.controller import LocalExecutor
from rlcore.engines import RewardResult
from rlcore_recipes.rollouts.reward_model import RewardModel
from rlcore_recipes.rollouts.scorer import checked
from rlcore_recipes.run.timing import Timings


def test_results_that_cannot_be_used_become_failed_ones(caplog: pytest.LogCaptureFixture) -> None:
    good = RewardResult(0.5, {"words": 3.0}, "x")
    bad = [
        *(RewardResult(score) for score in (math.nan, -math.inf, 1e39)),
        *(RewardResult(1.0, {name: 1.0}) for name in ("error_ratio", "", "two\nlines", "x" * 1000)),
        RewardResult(1.0, {"words": math.nan}),
        RewardResult(1.0, {str(number): 0.0 for number in range(20_000)}),
    ]
    assert checked([good, *bad, good], -1.0) == [good, *[RewardResult(-1.0, error="result")] * len(bad), good]
    assert "9 of 11 samples get error_score=-1, because the reward returned" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_a_reward_model_without_a_finite_score_fails_its_sample(value: float, caplog: pytest.LogCaptureFixture) -> None:
    engine = SimpleNamespace(offload=lambda: None)
    settings = SimpleNamespace(coeff=2.0, offload=True)
    model = RewardModel(engine, settings, -1.0, LocalExecutor(), Timings())  # type: ignore[arg-type]
    results = [RewardResult(0.5), RewardResult(1.0, {"words": 2.0}), RewardResult(0.0, error="timeout")]
    batch = Batch({"score": torch.tensor([0.5, 1.0, 0.0]), "group": torch.tensor([7, 8, 9]), "reward_result": results})
    values = Batch({"values": Jagged(torch.tensor([9.0, 3.0, 9.0, value, value]), torch.tensor([2, 2, 1]))})
    scored = model.added(batch, values, batch["group"])
    assert scored["score"].tolist() == [6.5, -1.0, -1.0]
    assert scored["reward_model_score"].tolist() == [3.0, 0.0, 0.0]
    assert scored["reward_result"] == [
        RewardResult(0.5),
        RewardResult(1.0, {"words": 2.0}, error="reward_model"),
        RewardResult(0.0, error="timeout"),
    ]
    assert "score of 2 of 3 samples is not finite; they get reward.error_score=-1 (prompts 8, 9)" in caplog.text
