"""A rollout engine that reports a log-prob that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlcore.batch import Batch
from rlcore.errors import RlcoreWarning
from rlcore_recipes.rollouts import synchronous


def test_one_log_prob_costs_one_sample(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a correction, it made every step be skipped."""
    made = synchronous.trajectories_of

    def with_one_nan(*args: Any) -> Batch:
        batch = made(*args)
        logprobs = batch.flat("rollout_logprobs").clone()
        logprobs[int(batch["prompt_length"][0])] = math.nan
        return batch.with_columns(rollout_logprobs=batch.jagged(logprobs))

    monkeypatch.setattr(synchronous, "trajectories_of", with_one_nan)
    changes = {"actor.objective.correction": "tis", "actor.objective.entropy_coeff": 0.01, "trainer.total_steps": 2}
    with pytest.warns(RlcoreWarning, match=r"has a number in rollout_logprobs that is not finite; such") as warned:
        result = task.run("grpo", tmp_path / "run", changes)
    assert result.exit_code == 0, result.output
    assert len([one for one in warned if "not finite" in str(one.message)]) == 1
    for line in metrics_of(tmp_path / "run"):
        assert line["rollout/non_finite_samples"] == 1
        assert line["actor/skipped_steps"] == 0
        assert math.isfinite(line["actor/loss"])
        assert line["actor/grad_norm"] > 0
