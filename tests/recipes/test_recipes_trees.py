"""Runs whose episodes branch, so that a trajectory has several rows, and of which some are invalid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

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


APART = {
    "controller.kind": "ray",
    "controller.pools": {"train": {"cpus_per_process": 0.5}, "gen": {"cpus_per_process": 0.5}},
    "controller.placement": {"actor": "train", "rollout": "gen", "reward": "gen", "compute": "gen"},
    "controller.call_timeout_s": 200,
    "actor.fsdp.device": "cpu",
    "rollout.inline.device": "cpu",
    "actor.objective.correction": "tis",
}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("recipe", "keys"), [("grpo", {}), ("dapo", {"algorithm.overlong": "null"})])
def test_batches_in_other_processes_may_have_any_number_of_rows(
    recipe: str, keys: dict[str, Any], task: Any, metrics_of: Metrics, tmp_path: Path
) -> None:
    """Asynchronously: the controller knows the rows' trajectories, and not their tokens."""
    keys = {**keys, "async.max_staleness": 1, "trainer.test_freq": 2, "trainer.val_before_train": False}
    result = task.run(recipe, tmp_path, TREES | APART | keys)
    assert result.exit_code == 0, result.output
    assert [metrics["rollout/rows_per_episode"] for metrics in metrics_of(tmp_path)] == [2, 2]


def test_a_group_without_a_valid_episode_is_replaced_by_dynamic_sampling(
    task: Any, metrics_of: Metrics, tmp_path: Path
) -> None:
    keys = {"broken_share": 0, "invalid": "[0,1,2]", "turn_rewards": False}
    scripted = {f"rollout.environment.scripted.{name}": value for name, value in keys.items()}
    changes = {"algorithm.overlong": "null", "trainer.total_steps": 1}
    result = task.run("dapo", tmp_path, TREES | scripted | changes)
    assert result.exit_code == 0, result.output
    (metrics,) = metrics_of(tmp_path)
    assert metrics["dynamic_sampling/groups"] >= 8 + 3
    assert metrics["dynamic_sampling/unfilled"] == 0
    assert metrics["rollout/invalid_episodes"] == 0


def test_a_resumed_run_of_trajectories_ends_with_the_same_weights(task: Any, tmp_path: Path) -> None:
    keys = {"trainer.save_freq": 1, "trainer.save_hf": True, "actor.optim.lr": 1e-2, "algorithm.advantage": "gigpo"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = [(whole, 3), (parts, 1), (parts, 3)]
    for folder, count in steps:
        result = task.run("grpo", folder, TREES | keys | {"trainer.total_steps": count})
        assert result.exit_code == 0, result.output
    expected, found = (load_file(folder / "model/model.safetensors") for folder in (whole, parts))
    assert all(expected[name].equal(found[name]) for name in expected)
    first = load_file(task.model / "model.safetensors")
    assert not all(expected[name].equal(first[name]) for name in expected)
