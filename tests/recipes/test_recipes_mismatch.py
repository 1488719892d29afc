"""Every step of every recipe says how far the sampler is from the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAMES = (
    "rollout_kl", "rollout_kl_k3", "rollout_ratio_max", "rollout_log_ratio_p001", "rollout_log_ratio_p999",
    "rollout_clipfrac", "rollout_maskfrac", "rollout_prob_diff",
)  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("grpo", {}),
        ("grpo", {"actor.mini_batch_size": 4}),
        ("grpo", {"actor.mini_batch_size": 4, "actor.old_logprobs": "rollout"}),
        ("dapo", {"actor.objective.correction": "mis", "algorithm.overlong.buffer": 4}),
        ("ppo", {}),
    ],
    ids=str,
)
def test_mismatch_is_in_the_metrics_of_every_step(
    task: Any,
    metrics_of: Callable[[Path], list[dict[str, float]]],
    tmp_path: Path,
    recipe: str,
    changes: dict[str, Any],
) -> None:
    result = task.run(recipe, tmp_path, {"data.train_batch_size": 12, "trainer.total_steps": 2, **changes})
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path)
    assert len(steps) == 2
    for step in steps:
        assert all(math.isfinite(step[f"actor/{name}"]) for name in NAMES)
        assert step["rollout/later_version_ratio"] == 0
        assert ("actor/correction_clipfrac" in step) == ("actor.objective.correction" in changes)
        if "actor.old_logprobs" not in changes:  # the sampler has the trainer's weights and precision
            assert abs(step["actor/rollout_log_ratio_p999"]) < 1e-4
            assert step["actor/rollout_ratio_max"] == pytest.approx(1, abs=1e-4)
            assert step["actor/rollout_clipfrac"] == 0
