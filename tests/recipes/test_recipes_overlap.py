"""Roles on separate pools work at the same time, and the trace of the run shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SLOW_REWARD = """
import time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    '''The share of lower-case letters, after a while.'''
    time.sleep(0.05)
    return sum(c.isascii() and c.islower() for c in solution_str) / 64
"""
STEPS = 3
SPAN = tuple[float, float]


def load(out_dir: Path) -> tuple[dict[str, list[tuple[str, SPAN]]], list[dict[str, Any]]]:
    """Of every process, what it did and when; and all records."""
    records = json.loads((out_dir / "trace.json").read_text())
    processes = {r["pid"]: r["args"]["name"] for r in records if r["name"] == "process_name"}
    done: dict[str, list[tuple[str, SPAN]]] = {name: [] for name in processes.values()}
    for record in records:
        assert record["ph"] in ("X", "M")
        if record["ph"] == "X":
            span = record["ts"], record["ts"] + record["dur"]
            done[processes[record["pid"]]].append((record["name"], span))
    return done, records


def spans(done: list[tuple[str, SPAN]], name: str) -> list[SPAN]:
    return [span for event, span in done if event == name]


def meet(left: list[SPAN], right: list[SPAN]) -> int:
    """How many of ``left`` go on at the same time as one of ``right``."""
    return sum(any(max(a[0], b[0]) < min(a[1], b[1]) for b in right) for a in left)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_models_and_rewards_work_at_the_same_time(task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path) -> None:
    """Prompts are generated for one after another, so there are rewards to compute early on; they are slow, and
    log-probs and values come in many small micro-batches."""
    reward = tmp_path / "reward.py"
    reward.write_text(SLOW_REWARD)
    out = tmp_path / "out"
    result = task.run(
        "ppo",
        out,
        {
            "trace": True,
            "trainer.total_steps": STEPS,
            "data.max_response_length": 64,
            "rollout.inline.max_running": 4,
            "actor.objective.kl_loss.coeff": 0.01,
            "ref.max_tokens_per_micro_batch": 96,
            "critic.max_tokens_per_micro_batch": 96,
            "reward.path": f"{reward}:compute_score",
            "controller.kind": "ray",
            "controller.call_timeout_s": 120,
            "controller.pools": {"train": {}, "gen": {}, "reference": {}, "value": {}},
            "controller.placement": {"actor": "train", "rollout": "gen", "ref": "reference", "critic": "value"},
        },
    )
    assert result.exit_code == 0, result.output

    done, _ = load(out)
    assert set(done) == {"controller", "train[0]", "gen[0]", "reference[0]", "value[0]", "cpu[0]"}
    generated = spans(done["gen[0]"], "rollout: run_groups")
    rewards = spans(done["cpu[0]"], "reward: score")
    ref, values = spans(done["reference[0]"], "ref.forward"), spans(done["value[0]"], "critic.forward")
    assert [len(generated), len(rewards), len(ref), len(values)] == [STEPS, STEPS * 8, STEPS, STEPS]
    # in some step: how long each part takes in another depends on who else wants the cores
    assert meet(generated, rewards)  # scored while generation is still going on
    assert meet(ref, values)
    assert meet(ref, rewards)
    assert meet(values, rewards)

    parts = {name for name, _ in done["controller"]}
    assert {"step", "gen", "reward", "ref", "values", "adv", "update_actor", "update_critic"} <= parts
    for line, (start, end) in zip(metrics_of(out), spans(done["controller"], "step")):
        within = lambda found: [s for s in found if start <= s[0] and s[1] <= end]  # noqa: B023, E731
        (own,) = within(ref)
        assert line["timing_s/ref"] >= (own[1] - own[0]) / 1e6 - 1e-3  # the worker's time, not that of asking for it
        assert line["timing_s/reward"] >= max(b - a for a, b in within(rewards)) / 1e6 - 1e-3
        assert all(line[f"timing_s/{part}"] <= line["timing_s/step"] + 0.05 for part in ("gen", "ref", "values", "adv"))


@pytest.mark.parametrize("trace", [True, False])
def test_a_run_in_one_process_writes_what_the_controller_did(task: Any, tmp_path: Path, trace: bool) -> None:
    changes = {"trace": trace, "trainer.total_steps": STEPS, "trainer.save_freq": 1}
    result = task.run("grpo", tmp_path, changes)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "trace.json").exists() == trace
    if not trace:
        return
    done, records = load(tmp_path)
    assert set(done) == {"controller"}
    assert [len(spans(done["controller"], part)) for part in ("step", "gen", "update_actor")] == [STEPS] * 3
    steps, parts = spans(done["controller"], "step"), spans(done["controller"], "gen")
    assert all(step[0] <= part[0] and part[1] <= step[1] + 1 for step, part in zip(steps, parts))

    result = task.run("grpo", tmp_path, {**changes, "trainer.total_steps": STEPS + 1, "trainer.resume": "auto"})
    assert result.exit_code == 0, result.output
    again, more = load(tmp_path)
    assert more[: len(records)] == records
    assert len(spans(again["controller"], "step")) == STEPS + 1
