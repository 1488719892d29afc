"""Asynchronous runs, end to end: how old samples get, that runs learn, stop, go on, and survive their workers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from rlcore.cli.command_tree import cli
from rlcore.errors import RlcoreWarning

WAIT_S = 240.0
APART = {
    "controller.kind": "ray",
    "controller.pools": {"train": {"cpus_per_process": 0.5}, "gen": {"cpus_per_process": 0.5}},
    "controller.placement": {"actor": "train", "rollout": "gen", "reward": "gen", "compute": "gen"},
    "controller.call_timeout_s": 200,
    "actor.fsdp.device": "cpu",
    "rollout.inline.device": "cpu",
    "actor.objective.correction": "tis",
}
# Sequences that take as long as several steps: they cannot but see new weights.
LONG = {"data.max_response_length": 96, "rollout.inline.max_running": 8, "rollout.n": 4, "data.train_batch_size": 4}
Metrics = Callable[[Path], Any]


def run(task: Any, recipe: str, out_dir: Path, k: int, **changes: Any) -> None:
    result = task.run(recipe, out_dir, {**APART, "async.max_staleness": k, **changes})
    assert result.exit_code == 0, result.output


def check_bound(lines: list[dict[str, float]], k: int) -> None:
    for line in lines:
        assert 0 <= line["rollout/staleness_mean"] <= line["rollout/staleness_max"] <= k
        assert {"async/wait_s", "async/ready", "async/in_flight"} <= line.keys()


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("k", [1, 2])
def test_staleness_is_bounded_and_sequences_cross_updates(
    task: Any, metrics_of: Metrics, tmp_path: Path, k: int
) -> None:
    changes = {**LONG, "trainer.total_steps": 8, "trainer.test_freq": 4, "trainer.val_before_train": False}
    run(task, "grpo", tmp_path, k, **changes)
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    check_bound(lines, k)
    assert max(line["rollout/staleness_max"] for line in lines) >= 1
    assert lines[0]["rollout/staleness_max"] == 0
    assert any(line["rollout/later_version_ratio"] > 0 for line in lines), "no sequence has tokens of two versions"
    assert any(name.startswith("val-core/") for name in lines[-1])
    # the rollout's log-probs are right for tokens of several versions, too
    assert max(line["actor/rollout_kl_k3"] for line in lines) < 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_it_learns(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    changes = {"trainer.total_steps": 30, "data.train_batch_size": 16, "actor.optim.lr": 1e-2}
    run(task, "grpo", tmp_path, 1, **changes)
    lines = metrics_of(tmp_path)
    check_bound(lines, 1)
    scores = [line["critic/score/mean"] for line in lines]
    assert scores[0] < 0.2
    assert sum(scores[-3:]) / 3 > 0.75, scores


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("ppo", {"critic.fsdp.device": "cpu", "critic.warmup_steps": 3, "actor.mini_batch_size": 4}),
        ("dapo", {"algorithm.overlong": "null", "actor.old_logprobs": "rollout", "actor.objective.correction": None}),
        ("grpo", {"algorithm.advantage": "remax"}),
    ],
)
def test_every_recipe(task: Any, metrics_of: Metrics, tmp_path: Path, recipe: str, changes: dict[str, Any]) -> None:
    placement = {**APART["controller.placement"], **({"critic": "train"} if recipe == "ppo" else {})}
    run(task, recipe, tmp_path, 2, **{"trainer.total_steps": 5, "controller.placement": placement, **changes})
    lines = metrics_of(tmp_path)
    assert len(lines) == 5
    check_bound(lines, 2)
    if recipe == "dapo":
        assert all(line["reward/equal_score_groups"] == 0 for line in lines)
        assert all(line["dynamic_sampling/passed"] <= 1 for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_run_stops_with_groups_under_way_and_goes_on(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    changes = {**LONG, "trainer.total_steps": 6, "trainer.save_freq": 100}
    stopper = when_logged(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(task, "grpo", tmp_path, 2, **changes)
    stopper.join()
    done = len(metrics_of(tmp_path))
    assert 2 <= done < 6
    assert not [thread for thread in threading.enumerate() if thread.name == "producer"]

    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    state = next(json.loads(path.read_text()) for path in folder.rglob("*.json") if '"ahead"' in path.read_text())
    prompts = state["parts"]["prompts"] if "parts" in state else state["state"]["parts"]["prompts"]
    trained = prompts["drawn"] * prompts["batch_size"] + len(prompts["ahead"])
    assert trained == done * 4, "the prompts that were trained on, and no other, are done with"

    run(task, "grpo", tmp_path, 2, **changes)
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 7))
    check_bound(lines, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore:.*it is replaced:rlcore.errors.RlcoreWarning")
def test_rollout_and_reward_processes_are_replaced(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    changes = {
        **LONG,
        "trainer.total_steps": 8,
        "controller.pools": {name: {"cpus_per_process": 0.5} for name in ("train", "gen", "judge")},
        "controller.placement": {"actor": "train", "rollout": "gen", "reward": "judge", "compute": "judge"},
    }
    killed: list[int] = []
    killers = [
        when_logged(tmp_path, 2, lambda: killed.append(kill(tmp_path, "gen-0"))),
        when_logged(tmp_path, 4, lambda: killed.append(kill(tmp_path, "judge-0"))),
    ]
    run(task, "grpo", tmp_path, 2, **changes)
    for killer in killers:
        killer.join()
    assert len(killed) == 2
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    check_bound(lines, 2)
    # tokens of the first weights under a later version's name would show here
    assert max(line["actor/rollout_kl_k3"] for line in lines) < 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_that_fails_ends_the_run_with_its_error(task: Any, tmp_path: Path) -> None:
    result = task.run("grpo", tmp_path, {**APART, "async.max_staleness": 1, "rollout.inline.kv_cache_tokens": 64,
                                         "data.max_response_length": 256})  # fmt: skip
    assert result.exit_code != 0
    assert "KV cache has a capacity of 64 tokens" in result.output


def when_logged(out_dir: Path, steps: int, act: Callable[[], Any]) -> threading.Thread:
    """Do ``act`` as soon as ``steps`` steps are done."""

    def watch() -> None:
        log, deadline = out_dir / "metrics.jsonl", time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) >= steps:
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def kill(out_dir: Path, name: str) -> int:
    """Kill the worker whose output goes to the log of that name."""
    log = str(out_dir.resolve() / "logs" / f"{name}.log")
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd" / "1") == log:
                os.kill(int(entry.name), signal.SIGKILL)
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no process writes to {log}")


# --- command line ---------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


def keys_of(task: Any, out_dir: Path, **changes: Any) -> list[str]:
    return task.arguments("grpo", out_dir, {**APART, **changes})[2:]


def test_the_key_on_the_command_line(task: Any, tmp_path: Path) -> None:
    shown = invoke("config", "show", "grpo", *keys_of(task, tmp_path, **{"async.max_staleness": 2}))
    assert shown.exit_code == 0, shown.output
    assert yaml.safe_load(shown.output)["async"]["max_staleness"] == 2

    file = tmp_path / "run.yaml"
    file.write_text(shown.output)
    assert invoke("config", "validate", "grpo", "--config", str(file)).exit_code == 0, "what is shown can be read again"

    assert "async.max_staleness=" in invoke("run", "grpo", "--help", "async").output
    schema = json.loads(invoke("config", "schema", "grpo").output)
    assert "async" in schema["properties"]

    typo = invoke("config", "show", "grpo", *keys_of(task, tmp_path, **{"async.max_stale": 2}))
    assert typo.exit_code != 0
    assert "did you mean async.max_staleness" in typo.output
    alone = invoke("config", "show", "grpo", *task.arguments("grpo", tmp_path, {"async.max_staleness": 1})[2:])
    assert alone.exit_code != 0
    assert "controller.kind=ray" in alone.output


def test_a_warning_names_what_corrects(task: Any, tmp_path: Path) -> None:
    changes = {"async.max_staleness": 1, "actor.objective.correction": None}
    with pytest.warns(RlcoreWarning, match=r"correction \(tis, mis or icepop\)"):
        result = invoke("config", "validate", "grpo", *keys_of(task, tmp_path, **changes))
    assert (result.exit_code, result.output) == (0, "valid\n")
