"""The learning gate with training: its fast tasks learn, and a comparison runs both versions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlcore.errors import RlcoreError
from rlcore_recipes.gate.compare import Arm, Gate, compare
from rlcore_recipes.gate.run import run_task
from rlcore_recipes.gate.sequential import SequentialTest
from rlcore_recipes.gate.tasks import FAST, TASKS

Learns = Callable[..., Any]
SHORT = replace(
    TASKS["grpo-letters"], keys={**TASKS["grpo-letters"].keys, "trainer.total_steps": 2, "data.train_batch_size": 4}
)


@pytest.mark.parametrize("name", FAST)
def test_the_fast_tasks_learn(learns: Learns, name: str) -> None:
    result = learns(name)
    assert result.values[0] < 0.3
    assert result.score > TASKS[name].learned


def test_what_does_not_learn_fails_the_test_and_shows_the_curve(learns: Learns) -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"actor.optim.lr=1e-9 trainer.total_steps=3 is not learned: .* ends at"
    ):
        learns("grpo-letters", "actor.optim.lr=1e-9", "trainer.total_steps=3")


def test_a_comparison_runs_both_interpreters_with_the_same_seed_and_finds_equal_runs(
    gate_folder: Path, tmp_path: Path
) -> None:
    python, seen = Path(sys.executable), []
    gate = Gate(gate_folder, report=seen.append)
    old, new = Arm("old", python=python), Arm("new", python=python)
    verdict = compare(SHORT, old, new, SequentialTest(0.1, looks=(1, 2)), gate)
    assert (verdict.outcome, verdict.pairs) == ("identical", 1)
    assert [(result.source, result.seed) for result in seen] == [("old", 0), ("new", 0)]
    assert seen[0].seconds > 0


def test_a_run_that_fails_says_which_and_why(gate_folder: Path) -> None:
    broken = replace(SHORT, keys={**SHORT.keys, "rollout.n": 0})
    with pytest.raises(RlcoreError, match=r"(?s)grpo-letters with seed 7 on new ended with exit code 1:.*rollout\.n"):
        run_task(broken, 7, gate_folder, Path(sys.executable), "new")
