"""Recipes whose vLLM engines have a Ray pool of their own: step by step, one step off, and with tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlcore.testing.tiny_model import tiny_model

pytest.importorskip("vllm")
pytest.importorskip("ray")

Metrics = Callable[[Path], list[dict[str, float]]]
STEPS = 3
PARTS_OF_CORES = {"cpus_per_process": 0.5}
APART = {
    "rollout.engine": "vllm",
    "rollout.vllm": {"kv_cache_memory_bytes": 16 << 20, "max_num_seqs": 64},
    "actor.fsdp.device": "cpu",
    "actor.optim.lr": 5e-3,
    "trainer.val_before_train": False,
    "trainer.total_steps": STEPS,
    "controller.kind": "ray",
    "controller.pools": {"train": PARTS_OF_CORES, "gen": PARTS_OF_CORES},
    "controller.placement": {"actor": "train", "rollout": "gen", "reward": "train", "compute": "train"},
    "controller.call_timeout_s": 600,
}
RECIPES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "ppo": {"critic.fsdp.device": "cpu", "controller.placement": {**APART["controller.placement"], "critic": "train"}},
    "dapo": {"algorithm.overlong": {"buffer": 4}},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for all runs of this module."""
    from rlcore.controller.placement import ResourcePool
    from rlcore.controller.ray import cluster

    started = cluster.connect(None, {"all": ResourcePool(processes=4)})
    yield
    if started:
        cluster.disconnect()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of 32 dimensions: vLLM's attention has no kernel on the CPU for smaller ones."""
    return tiny_model(tmp_path_factory.mktemp("vllm") / "model", architecture="Llama", head_dim=32)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("recipe", RECIPES)
def test_step_by_step(task: Any, model: Path, metrics_of: Metrics, tmp_path: Path, recipe: str) -> None:
    result = task.run(recipe, tmp_path, {**APART, "model.path": model, **RECIPES[recipe]})
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path)
    assert len(steps) == STEPS
    assert all(map(sampled_by_the_trained_policy, steps))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_step_off(task: Any, model: Path, metrics_of: Metrics, tmp_path: Path, recipe: str) -> None:
    changes = {"async.max_staleness": 1, "actor.objective.correction": "tis", "trainer.total_steps": STEPS + 1}
    result = task.run(recipe, tmp_path, {**APART, "model.path": model, **RECIPES[recipe], **changes})
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path)
    assert len(steps) == STEPS + 1
    assert all(0 <= step["rollout/staleness_mean"] <= step["rollout/staleness_max"] <= 1 for step in steps)
    assert max(step["rollout/staleness_max"] for step in steps) == 1
    assert sampled_by_the_trained_policy(steps[0])
    assert 0 < max(step["actor/rollout_kl_k3"] for step in steps) < 0.05, "an update older, and no older"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_two_training_processes_and_two_that_share_layers(
    task: Any, model: Path, metrics_of: Metrics, tmp_path: Path
) -> None:
    changes = {
        "rollout.vllm": {"mode": "process", "tensor_parallel_size": 2, "kv_cache_memory_bytes": 16 << 20},
        "controller.pools": {"train": {"processes": 2, **PARTS_OF_CORES}, "gen": PARTS_OF_CORES},
        "weight_sync.bucket_mb": 1,
    }
    result = task.run("grpo", tmp_path, {**APART, "model.path": model, **changes})
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path)
    assert len(steps) == STEPS
    assert all(map(sampled_by_the_trained_policy, steps))


def sampled_by_the_trained_policy(step: dict[str, float]) -> bool:
    """Whether the sampler's log-probs of its tokens are the trainer's within 1e-4, before the step's update."""
    quantiles = (step["actor/rollout_log_ratio_p001"], step["actor/rollout_log_ratio_p999"])
    return abs(step["actor/rollout_ratio_max"] - 1) < 1e-4 and all(abs(value) < 1e-4 for value in quantiles)
