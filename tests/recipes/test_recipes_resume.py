"""Runs that are killed and go on: the weights must not know."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlcore_kit.testing.forks import Forked

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
    "raft": {
        "actor.optim.lr": 1e-2,
        "actor.mini_batch_size": 4,
        "algorithm.restart": True,
        "algorithm.rationalization.hint": "' ({ground_truth})'",
        "algorithm.selection.keep_truncated": True,
        "algorithm.selection.selector": "{name: threshold, min_score: 0.3}",
    },
    "prime": {
        "actor.optim.lr": 1e-2,
        "actor.mini_batch_size": 4,
        "prm.optim.lr": 1e-2,
        "prm.right_above": 0.12,
        "algorithm.dynamic_sampling": "null",
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
    (process,) = task.fork(recipe, killed, changes)
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


def wait_for(folder: Path, pattern: str, process: Forked, seconds: float = 120, pause: float = 0.02) -> None:
    for _ in range(int(seconds / pause)):
        if any(folder.glob(pattern)):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(pause)
    raise AssertionError(f"no {pattern} in {folder} after {seconds} s")


def test_sigterm_ends_the_run_after_a_step_with_a_checkpoint(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    changes = {"trainer.total_steps": 500, "trainer.save_freq": 500}
    (process,) = task.fork("grpo", tmp_path, changes)
    wait_for(tmp_path, "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    done = metrics_of(tmp_path)[-1]["step"]
    assert f"stopped after step {done} of 500; run the same command again to continue" in output
    result = task.run("grpo", tmp_path, {**changes, "trainer.total_steps": done + 1})
    assert result.exit_code == 0, result.output
    assert f"continuing after step {done}" in result.output
    assert "trainer.total_steps" in result.output
    assert metrics_of(tmp_path)[-1]["step"] == done + 1
    assert (tmp_path / f"config-until-step-{done}.yaml").exists()


# --- killed while a checkpoint is written ----------------------------------------------------------------------------

SFT = {
    **dict.fromkeys(("data.max_response_length", "data.max_prompt_length", "rollout.n", "reward.path"), None),
    "reward.workers": None,
    "actor.optim.lr": 1e-2,
    "trainer.total_steps": 12,
    "trainer.save_freq": 1,
    "trainer.save_hf": "true",
}
# what `pip install` would leave of a package with a file system that cannot rename
BUCKET = """
from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
    protocol = "bucket"

    @classmethod
    def _strip_protocol(cls, path):
        if isinstance(path, list):
            return [cls._strip_protocol(part) for part in path]
        return LocalFileSystem._strip_protocol(str(path).removeprefix("bucket://"))

    def mv(self, *arguments, **options):
        raise NotImplementedError("an object store cannot rename")

    mv_file = rename = move = mv
"""


@pytest.fixture(scope="module")
def undisturbed(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Final weights of the run on so many processes, made once."""
    known: dict[int, dict[str, Any]] = {}

    def final(processes: int) -> dict[str, Any]:
        if processes not in known:
            folder = tmp_path_factory.mktemp(f"undisturbed-{processes}")
            to_the_end(task, folder, {**SFT, "trainer.save_freq": -1}, processes)
            known[processes] = weights(folder)
        return known[processes]

    return final


def to_the_end(task: Any, folder: Path, changes: dict[str, Any], processes: int) -> str:
    ranks = task.fork("sft", folder, changes, processes)
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * processes, outputs
    return "\n".join(outputs)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["sync", "async", "bucket"])
def test_all_processes_killed_while_a_checkpoint_is_written(
    task: Any,
    undisturbed: Callable[[int], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    processes: int,
) -> None:
    chance = random.Random(f"{kind} {processes}")
    folder, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    changes = {**SFT, "trainer.async_save": str(kind != "sync").lower()}
    unfinished = "*.tmp"
    if kind == "bucket":
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(install_bucket(tmp_path / "packages")), prepend=os.pathsep)
        changes["trainer.checkpoint_dir"] = f"bucket://{checkpoints}"
        unfinished = "step-*/unfinished"
    for first in (2, 6):
        ranks = task.fork("sft", folder, changes, processes)
        try:
            wait_for(checkpoints, f"step-{first + chance.randint(0, 2):06d}*", ranks[0])
            wait_for(checkpoints, unfinished, ranks[0], pause=0.001)
            time.sleep(chance.uniform(0, 0.01))
        finally:
            kill_all(ranks)
        assert not (folder / "model").exists()
    output = to_the_end(task, folder, changes, processes)
    assert "continuing after step" in output
    assert "damaged" not in output
    expected, found = undisturbed(processes), weights(folder)
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000011", "step-000012"]
    assert not list(checkpoints.glob(unfinished))
    if kind == "bucket":
        disk = next(tmp_path.glob("rlcore-checkpoints-*"))
        assert not [path for path in disk.rglob("*") if path.is_file() and path.suffix != ".lock"]


def install_bucket(site: Path) -> Path:
    (site / "bucket_store-1.0.dist-info").mkdir(parents=True)
    (site / "bucket_store.py").write_text(BUCKET)
    (site / "bucket_store-1.0.dist-info" / "METADATA").write_text("Name: bucket-store\nVersion: 1.0\n")
    entry_points = site / "bucket_store-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text("[fsspec.specs]\nbucket = bucket_store.Bucket\n")
    return site


def kill_all(processes: list[Forked]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        process.stdout.close()
