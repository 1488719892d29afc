"""Recipes whose vLLM engines have a separate Ray pool: step by step, one step off, and with tensor parallelism."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlcore_kit.testing.tiny_model import tiny_model

Steps = list[dict[str, float]]
Run = Callable[[str, dict[str, Any]], Steps]
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
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of 32 dimensions: vLLM's attention has no kernel on the CPU for smaller ones."""
    return tiny_model(tmp_path_factory.mktemp("vllm") / "model", architecture="Llama", head_dim=32)


@pytest.fixture
def run(task: Any, model: Path, metrics_of: Callable[[Path], Steps], cluster: None, tmp_path: Path) -> Run:
    """Runs a recipe in ``tmp_path``; the metrics of its steps."""

    def ran(recipe: str, changes: dict[str, Any]) -> Steps:
        result = task.run(recipe, tmp_path, {**APART, "model.path": model, **changes})
        assert result.exit_code == 0, result.output
        return metrics_of(tmp_path)

    return ran


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo", "dapo"])  # grpo: the tests of several processes, and of a killed one
def test_step_by_step(run: Run, recipe: str) -> None:
    steps = run(recipe, RECIPES[recipe])
    assert len(steps) == STEPS
    assert all(map(sampled_by_the_trained_policy, steps))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_step_off(run: Run, recipe: str) -> None:
    changes = {"async.max_staleness": 1, "actor.objective.correction": "tis", "trainer.total_steps": STEPS + 1}
    steps = run(recipe, {**RECIPES[recipe], **changes})
    assert len(steps) == STEPS + 1
    assert all(0 <= step["rollout/staleness_mean"] <= step["rollout/staleness_max"] <= 1 for step in steps)
    assert max(step["rollout/staleness_max"] for step in steps) == 1
    assert sampled_by_the_trained_policy(steps[0])
    assert 0 < max(step["actor/rollout_kl_k3"] for step in steps) < 0.05, "an update older, and no older"


@pytest.mark.slow
def test_two_training_processes_and_two_that_share_layers(run: Run) -> None:
    changes = {
        "rollout.vllm": {"mode": "process", "tensor_parallel_size": 2, "kv_cache_memory_bytes": 16 << 20},
        "controller.pools": {"train": {"processes": 2, **PARTS_OF_CORES}, "gen": PARTS_OF_CORES},
        "weight_sync.bucket_mb": 1,
    }
    steps = run("grpo", changes)
    assert len(steps) == STEPS
    assert all(map(sampled_by_the_trained_policy, steps))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*it is replaced:rlcore.errors.RlcoreWarning")
def test_an_engine_process_that_is_killed(run: Run, tmp_path: Path) -> None:
    """The rollout's process goes with it, and the one in its place generates with the current weights."""
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.append(kill_engine_after(tmp_path, steps=2)), daemon=True)
    killer.start()
    changes = {
        "rollout.vllm": {"mode": "process", "kv_cache_memory_bytes": 16 << 20},
        "data.max_response_length": 64,
        "trainer.total_steps": 5,
    }
    steps = run("grpo", changes)
    killer.join()
    assert len(killed) == 1
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert all(map(sampled_by_the_trained_policy, steps))


def kill_engine_after(out_dir: Path, steps: int) -> int:
    """Kill vLLM's engine process, whose output goes to the log of the rollout's, when ``steps`` steps are done."""
    lines, deadline = out_dir / "metrics.jsonl", time.monotonic() + 600
    log = str(out_dir.resolve() / "logs" / "gen-0.log")
    while (engine := engine_that_writes_to(log)) is None:  # looked for early: the search takes longer than a step
        assert time.monotonic() < deadline, f"no engine writes to {log}"
        time.sleep(0.5)
    while not lines.exists() or len(lines.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    engine.kill()
    return engine.pid


def engine_that_writes_to(log: str) -> psutil.Process | None:
    for process in psutil.process_iter():
        try:
            if "EngineCore" in " ".join(process.cmdline()) and os.readlink(f"/proc/{process.pid}/fd/1") == log:
                return process
        except (OSError, psutil.Error):
            continue
    return None


def sampled_by_the_trained_policy(step: dict[str, float]) -> bool:
    """Whether the sampler's log-probs of its tokens are the trainer's within 1e-4, before the step's update."""
    quantiles = (step["actor/rollout_log_ratio_p001"], step["actor/rollout_log_ratio_p999"])
    return abs(step["actor/rollout_ratio_max"] - 1) < 1e-4 and all(abs(value) < 1e-4 for value in quantiles)
