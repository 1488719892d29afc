"""Runs whose episodes branch, so that a trajectory has several rows, and of which some are invalid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Metrics = Callable[[Path], list[dict[str, float]]]
TREES = {
    "rollout.environment": "scripted",
    "rollout.environment.scripted.turns": 3,
    "rollout.environment.scripted.branches": True,
    "rollout.environment.scripted.broken_share": 5,
    "rollout.environment.scripted.turn_rewards": True,
    "rollout.environment.retries": 0,
    "reward.path": None,
    "reward.workers": None,
    "data.max_response_length": 16,
    "trainer.total_steps": 2,
    "actor.mini_batch_size": 4,
}
"""Episodes of three turns in two rows, which share the first turn. Every fifth is invalid."""


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("grpo", {"trainer.test_freq": 1, "trainer.val_before_train": False, "trainer.log_rollouts": -1}),
        ("grpo", {"algorithm.advantage": "gigpo", "actor.objective.aggregation": "seq-mean-token-mean"}),
        ("grpo", {"algorithm.credit": "turn", "algorithm.kl_in_reward": "{coeff: 0.1}"}),
        ("grpo", {"algorithm.credit": "branch", "algorithm.shared_tokens": "every_row"}),
        ("dapo", {"algorithm.overlong": "{buffer: 8}"}),
        ("ppo", {}),
        ("raft", {}),
        ("prime", {}),
        ("online_dpo", {}),
    ],
)
def test_every_recipe_trains_on_trajectories_of_several_rows(
    recipe: str, keys: dict[str, Any], task: Any, metrics_of: Metrics, tmp_path: Path
) -> None:
    result = task.run(recipe, tmp_path, TREES | keys)
    assert result.exit_code == 0, result.output
    for metrics in metrics_of(tmp_path):
        assert metrics["rollout/rows_per_episode"] == 2
        assert 0 < metrics["rollout/invalid_episodes"] < 32
        assert 0 < metrics["rollout/shared_token_ratio"] < 1
        assert 2 <= metrics["response_length/max"] <= 4
        assert metrics["reward/error_ratio"] == 0
        assert metrics["critic/rewards/max"] <= (8 if keys.get("algorithm.credit") == "branch" else 4)
