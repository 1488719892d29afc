"""Runs that are killed and go on: the weights must not know."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

STEPS = 30  # a run of seconds: the kill comes long before its end
KEEP_ON = {"trainer.total_steps": STEPS, "trainer.save_freq": 1, "trainer.save_hf": "true"}
RECIPES = {
    "grpo": {"actor.mini_batch_size": 4, "actor.optim.schedule": "cosine", "actor.optim.lr": 1e-3},
    "ppo": {
        "actor.optim.lr": 1e-3,
        "actor.epochs": 2,
        "algorithm.kl_in_reward.coeff": 0.05,
        "algorithm.kl_in_reward.target": 0.01,
        "algorithm.kl_in_reward.horizon": 100,
    },
    "dapo": {"actor.optim.lr": 1e-2, "algorithm.overlong.buffer": 4, "data.train_batch_size": 12},
}


def weights(out_dir: Path) -> dict[str, Any]:
    return load_file(out_dir / "model" / "model.safetensors")


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_run_ends_with_the_same_weights(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, recipe: str
) -> None:
    changes = {**KEEP_ON, **RECIPES[recipe]}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert task.run(recipe, undisturbed, changes).exit_code == 0
    chance = random.Random(recipe)
    process = task.start(recipe, killed, changes)
    try:
        wait_for(killed / "checkpoints", f"step-{chance.randint(1, STEPS // 3):06d}*", process)
        time.sleep(chance.uniform(0, 0.2))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    process.stdout.close()
    assert not (killed / "model").exists()
    assert task.run(recipe, killed, changes).exit_code == 0
    expected, found = weights(undisturbed), weights(killed)
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    assert not all(expected[name].equal(start) for name, start in load_file(task.model / "model.safetensors").items())
    assert [line["step"] for line in metrics_of(killed)] == list(range(1, STEPS + 1))
    for before, after in zip(metrics_of(undisturbed), metrics_of(killed)):
        assert before["critic/score/mean"] == after["critic/score/mean"]
        assert before.get("actor/reward_kl_penalty_coeff") == after.get("actor/reward_kl_penalty_coeff")


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str], seconds: float = 120) -> None:
    for _ in range(int(seconds / 0.02)):
        if any(folder.glob(pattern)):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} in {folder} after {seconds} s")


def test_sigterm_ends_the_run_after_a_step_with_a_checkpoint(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    changes = {"trainer.total_steps": 500, "trainer.save_freq": 500}
    process = task.start("grpo", tmp_path, changes)
    wait_for(tmp_path, "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    done = metrics_of(tmp_path)[-1]["step"]
    assert f"stopped after step {done} of 500; run the same command again to continue" in output
    result = task.run("grpo", tmp_path, {**changes, "trainer.total_steps": done + 1})
    assert result.exit_code == 0, result.output
    assert f"continuing after step {done}" in result.output
    assert "trainer.total_steps" in result.output
    assert metrics_of(tmp_path)[-1]["step"] == done + 1
    assert (tmp_path / f"config-until-step-{done}.yaml").exists()
