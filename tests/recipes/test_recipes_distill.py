"""Distillation from the command line: a tiny student learns from a tiny trained teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlcore_kit.testing.tiny_model import tiny_model

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
        pytest.param({"trainer.test_freq": 15}, id="whole vocabulary"),
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
    validated = [line["val-core/letters/divergence"] for line in lines if "val-core/letters/divergence" in line]
    assert validated == sorted(validated, reverse=True)
    assert len(validated) == (2 if "trainer.test_freq" in changes else 0)
    divergences = [line["actor/divergence"] for line in lines if "actor/divergence" in line]
    assert sum(divergences[-3:]) < 0.5 * sum(divergences[:3]), divergences


def test_the_reverse_kl_of_sampled_tokens_is_an_advantage(
    task: Any, teacher: Path, metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    changes = {
        "distill.teachers.big.model.path": teacher,
        "distill.advantage_coeff": 1,
        "actor.objective.divergence.coeff": 0,
        "actor.objective.policy_loss": "reinforce",
        "data.train_batch_size": 32,
        "trainer.total_steps": 20,
    }
    result = task.run("distill", tmp_path, {**DISTILL, **changes})
    assert result.exit_code == 0, result.output
    measured = [line["distill/sampled_reverse_kl"] for line in metrics_of(tmp_path)]
    assert sum(measured[-3:]) < 0.7 * sum(measured[:3]), measured


def test_a_task_reward_is_learned_next_to_the_teacher(
    task: Any, teacher: Path, metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    changes = {
        "reward.path": task.keys["reward.path"],
        "reward.workers": 1,
        "distill.teachers.big.model.path": teacher,
        "actor.objective.divergence": "{coeff: 0.1, top_k: 8}",
        "rollout.n": 4,
        "algorithm.advantage": "grpo",
    }
    result = task.run("distill", tmp_path, {**DISTILL, **changes})
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path)
    assert lines[-1]["critic/score/mean"] > lines[0]["critic/score/mean"] + 0.2
    assert lines[-1]["actor/divergence"] < lines[0]["actor/divergence"]
    assert all(line["actor/pg_loss"] != 0 for line in lines[:3])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="weights of the start"),
        pytest.param({"distill.teachers.me.weights": "current"}, id="current weights"),
        pytest.param({"actor.fsdp.lora": "{rank: 4, dropout: 0.3}"}, id="below adapters"),
    ],
)
def test_a_student_learns_from_itself_with_a_privileged_prompt(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The template of the privileged prompt needs the answer, and is longer than a prompt of the student may be."""
    model = tiny_model(tmp_path / "model", initializer_range=0.2)  # its answers depend on the prompt
    template = "{prompt} The answer to what was asked here is known to be {ground_truth}, {response}."
    keys = {**DISTILL, "distill.teachers.me.prompt_template": template, "trainer.total_steps": 8, **changes}
    keys |= {"model.path": model, "actor.optim.lr": 2e-3}
    result = task.run("distill", tmp_path, keys)
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path)
    assert all(line["actor/divergence"] > 1e-4 for line in lines)  # of two prompts
    assert lines[-1]["actor/divergence"] < 0.9 * lines[0]["actor/divergence"]


def test_a_student_is_its_own_teacher_with_divergence_zero(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    """The same weights and the same prompt, rendered a second time: prompts and completions must be aligned."""
    keys = {**DISTILL, "distill.teachers.me.prompt_template": "{prompt}", "trainer.total_steps": 1}
    result = task.run("distill", tmp_path, keys)
    assert result.exit_code == 0, result.output
    assert abs(metrics_of(tmp_path)[0]["actor/divergence"]) < 1e-6
