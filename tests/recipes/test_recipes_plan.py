"""What `rlcore plan` says of a run, and that it starts none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlcore.cli.command_tree import cli

APART = {
    "controller.kind": "ray",
    "controller.pools": {"train": {"processes": 2}, "gen": {"processes": 3, "cpus_per_process": 0.5}},
    "controller.placement": {"actor": "train", "critic": "train", "ref": "gen", "rollout": "gen"},
}


def planned(task: Any, recipe: str, out_dir: Path, changes: dict[str, Any], exit_code: int = 0) -> str:
    arguments = ["plan", *task.arguments(recipe, out_dir, changes)[1:]]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    assert not out_dir.exists()
    return "\n".join(" ".join(line.split()) for line in result.output.splitlines())


def test_pools_roles_and_sizes_of_ppo_over_ray(task: Any, tmp_path: Path) -> None:
    changes = {
        **APART,
        "actor.mini_batch_size": 4,
        "actor.epochs": 3,
        "critic.mini_batch_size": 2,
        "actor.objective.kl_loss.coeff": 0.1,
    }
    text = planned(task, "ppo", tmp_path / "out", changes)
    assert "train 2 1 CPU, 0 GPU pack actor, critic actor, critic: world size 2 the run restarts" in text
    assert "gen 3 0.5 CPU, 0 GPU pack ref, rollout the run restarts" in text
    assert "cpu 1 1 CPU, 0 GPU pack reward, compute it is replaced" in text
    assert "take turns: actor, critic (train); ref, rollout (gen)\n" in text
    assert "can run at the same time: train with gen; train with cpu; gen with cpu" in text
    assert "weights to the rollout: train[0] to 3 processes of gen, by shm on one machine, else gloo" in text
    assert "samples of a step 32 8 prompts × 4 completions" in text
    assert "mini-batch of the actor 16 samples" in text
    assert "optimizer steps of the actor in a step 6 8 / 4 mini-batches × 3 epochs" in text
    assert "optimizer steps of the critic in a step 12 8 / 2 mini-batches × 3 epochs" in text
    assert "longest sequence 40 tokens 32 + 8 tokens" in text
    assert "steps 3 trainer.total_steps" in text
    assert "6 processes for 4.5 CPU" in text


@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_gpus_decide_how_weights_travel(task: Any, tmp_path: Path, recipe: str) -> None:
    changes = {
        "controller.kind": "ray",
        "controller.pools": {"train": {"gpus_per_process": 1}, "gen": {"gpus_per_process": 0.5}},
        "controller.placement": {"actor": "train", "rollout": "gen"},
        "algorithm.overlong": "{buffer: 4}" if recipe == "dapo" else None,
    }
    text = planned(task, recipe, tmp_path / "out", changes)
    assert "by ipc on one GPU, else nccl" in text
    assert "1.5 GPU are needed here" in text
    text = planned(task, recipe, tmp_path / "out", {**changes, "weight_sync.transport": "gloo"})
    assert "to 1 process of gen, by gloo" in text


def test_local_runs_and_sft(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = dict.fromkeys(
        ["data.max_response_length", "data.max_prompt_length", "rollout.n", "reward.path", "reward.workers"]
    )
    text = planned(task, "sft", tmp_path / "out", none)
    assert "all roles in this process" in text
    assert "roles: actor, compute\n" in text
    assert "samples of a step 8" in text
    assert "rollout" not in text
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert "each of the 4 processes that torchrun started" in planned(task, "grpo", tmp_path / "out", {})
    monkeypatch.setenv("RANK", "3")
    assert planned(task, "grpo", tmp_path / "out", {}) == ""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"controller.placement": {"rollout": "gne"}},
            "controller.placement.rollout: there is no pool 'gne' (did you mean 'gen'?); the pools are train, gen",
        ),
        (
            {"controller.placement": {"actor": "train", "rollout": "gen", "critic": "gen"}},
            "controller.placement.critic: takes no part in this run; its roles are actor, rollout, reward, compute",
        ),
        (
            {"controller.placement": {"actor": "train", "rollout": "train"}},
            "controller.pools.gen: no role is on this pool: place one there, or leave the pool out",
        ),
        ({"controller.kind": "local"}, "controller.pools: is for kind=ray; this run has kind=local"),
        (
            {
                "async.max_staleness": 1,
                "algorithm.advantage": "remax",
                "reward_model.model.path": "judge",
                "controller.placement": {"actor": "train", "reward_model": "train", "rollout": "gen"},
            },
            "reward_model: would score samples but not the baselines that remax compares them with",
        ),
        (
            {"controller.pools": {"train": {"gpus_per_process": 2.5}}},
            "neither a whole number nor a fraction of one GPU",
        ),
    ],
)
def test_placements_that_cannot_be_meant_are_refused(
    task: Any, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    text = planned(task, "grpo", tmp_path / "out", {**APART, **changes}, exit_code=1)
    assert problem in " ".join(text.split())


def test_nothing_is_started_or_imported(task: Any, tmp_path: Path) -> None:
    script = (
        "import sys; from rlcore.cli.command_tree import cli; cli.main(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    changes = {**APART, "controller.placement": {"actor": "train", "rollout": "gen"}}
    arguments = ["plan", *task.arguments("grpo", tmp_path / "out", changes)[1:]]
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert "'ray'" not in process.stdout.splitlines()[-1]
