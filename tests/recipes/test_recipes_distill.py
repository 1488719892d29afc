"""Distillation from the command line: a tiny student learns from a tiny trained teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DISTILL = {
    "reward.path": None,
    "reward.workers": None,
    "rollout.n": 1,
    "data.train_batch_size": 16,
    "trainer.total_steps": 15,
    "actor.optim.lr": 1e-2,
}


@pytest.fixture(scope="module")
def teacher(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained to answer ``abcd``."""
    out: Path = tmp_path_factory.mktemp("teacher")
    sft = {name: task.keys[name] for name in ("model.path", "data.train_files", "trainer.trackers")}
    keys = {**dict.fromkeys(task.keys), **sft, "data.train_batch_size": 16, "data.max_length": 64}
    keys |= {"trainer.total_steps": 20, "trainer.save_hf": True, "actor.optim.lr": 1e-2}
    result = task.run("sft", out, keys)
    assert result.exit_code == 0, result.output
    return out / "model"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="whole vocabulary"),
        pytest.param({"actor.objective.divergence": "{kind: {name: jsd, beta: 0.5}, top_k: 8}"}, id="top k"),
        pytest.param(
            {"distill.on_policy_fraction": 0, "actor.objective.divergence.kind": "forward-kl"}, id="off-policy"
        ),
        pytest.param({"distill.on_policy_fraction": 0.5, "actor.objective.nll_coeff": 0.1}, id="mixture"),
    ],
)
def test_the_divergence_falls(
    task: Any, teacher: Path, metrics_of: Callable[[Path], Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    result = task.run("distill", tmp_path, {**DISTILL, "distill.teachers.big.model.path": teacher, **changes})
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path)
    divergences = [line["actor/divergence"] for line in lines]
    assert sum(divergences[-3:]) < 0.5 * sum(divergences[:3]), divergences
