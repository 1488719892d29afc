"""Distillation from the command line: a tiny student learns from a tiny trained teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlcore import plugins
from rlcore.config import load_config
from rlcore_kit.testing.tiny_model import tiny_model

DISTILL = {
    "reward.path": None,
    "reward.workers": None,
    "rollout.n": 1,
    "data.train_batch_size": 16,
    "trainer.total_steps": 15,
    "actor.optim.lr": 1e-2,
}


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
    keys: dict[str, Any] = {
        **DISTILL,
        "distill.teachers.me.prompt_template": template,
        "trainer.total_steps": 8,
        **changes,
    }
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


def write_rows(path: Path, rows: int, **columns: Any) -> Path:
    path.write_text(
        "".join(
            json.dumps({"prompt": f"say {n}", "data_source": "ab"[n % 2], "response": "abcd", **columns}) + "\n"
            for n in range(rows)
        )
    )
    return path


@pytest.fixture(scope="module")
def two_teachers(task: Any, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher for each data source, of which one has a vocabulary that is padded to another size."""
    folder = tmp_path_factory.mktemp("two")
    return {
        **DISTILL,
        "data.train_files": write_rows(folder / "rows.jsonl", 48),
        "actor.objective.divergence": "{kind: jsd, top_k: 8}",
        "actor.objective.nll_coeff": 0.1,
        "distill.on_policy_fraction": 0.5,
        "distill.teachers.big.model.path": teacher,
        "distill.teachers.big.data_sources": "[a]",
        "distill.teachers.padded.model.path": tiny_model(folder / "padded", seed=3, vocab_size=320),
        "distill.teachers.padded.max_tokens_per_micro_batch": 64,
        "trainer.total_steps": 4,
        "trainer.save_hf": True,
    }


def test_a_run_that_goes_on_ends_with_the_same_weights(task: Any, two_teachers: dict[str, Any], tmp_path: Path) -> None:
    assert task.run("distill", tmp_path / "whole", two_teachers).exit_code == 0
    part = {**two_teachers, "trainer.total_steps": 2, "trainer.save_freq": 2, "trainer.save_hf": False}
    assert task.run("distill", tmp_path / "resumed", part).exit_code == 0
    assert task.run("distill", tmp_path / "resumed", {**two_teachers, "trainer.save_freq": 2}).exit_code == 0
    whole, resumed = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "resumed"))
    start = load_file(task.model / "model.safetensors")
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert not all(whole[name].equal(start[name]) for name in start)


@pytest.mark.usefixtures("cluster")
def test_a_teacher_on_a_separate_pool_gives_the_same_steps(
    task: Any, two_teachers: dict[str, Any], metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    keys = {**two_teachers, "trainer.total_steps": 2, "trainer.save_hf": False}
    keys["distill.teachers.padded.prompt_template"] = "{prompt} in {data_source}"
    ray_keys = {
        "controller.kind": "ray",
        "controller.pools": {"policy": {}, "teachers": {"processes": 2}},
        "controller.placement": {
            "actor": "policy",
            "rollout": "policy",
            "teacher_big": "policy",
            "teacher_padded": "teachers",
        },
        "controller.call_timeout_s": 600,
    }
    found = []
    for name, changes in {"local": {}, "ray": ray_keys}.items():
        result = task.run("distill", tmp_path / name, {**keys, **changes})
        assert result.exit_code == 0, result.output
        found.append(metrics_of(tmp_path / name))
    for local, ray in zip(*found):
        for name in ("actor/divergence", "actor/nll", "actor/grad_norm", "actor/teacher_top_mass"):
            assert ray[name] == pytest.approx(local[name], rel=1e-4)


def test_mistakes_are_named_before_anything_is_built(task: Any, teacher: Path, tmp_path: Path) -> None:
    one = {**DISTILL, "distill.teachers.big.model.path": teacher}

    def message(changes: dict[str, Any], keys: dict[str, Any] = one) -> str:
        result = task.run("distill", tmp_path / "out", {**keys, **changes})
        assert result.exit_code == 1, result.output
        assert not (tmp_path / "out").exists()
        return " ".join(result.output.split())

    assert "distill" in message({}, DISTILL)
    assert "there is no such folder" in message({"distill.teachers.big.model.path": tmp_path / "nowhere"})
    other = tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    swapped = {word: {3: 4, 4: 3}.get(number, number) for word, number in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] = swapped
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = message({"distill.teachers.big.model.path": other})
    assert "distill.teachers.big: the teacher's tokenizer differs from the student's in 2 tokens" in found
    assert "distill.teachers.big.cross_tokenizer=true" in found
    found = message({"distill.teachers.big.data_sources": "[maths]"})
    assert "no teacher has the data source 'letters'" in found
    found = message({"distill.teachers.big.prompt_template": "{prompt} {hint}"})
    assert "prompt 0 of the data: the teacher's prompt_template names {hint}" in found
    assert "prompt_key" in message(
        {"distill.teachers.big.prompt_key": "response", "distill.teachers.big.prompt_template": "x"}
    )
    assert "'hint', the teacher's prompt, is missing" in message({"distill.teachers.big.prompt_key": "hint"})
    found = message({"actor.objective.divergence.coeff": 0})
    assert "nothing would be learned from the teacher" in found
    assert "uses none" in message({"actor.objective.nll_coeff": 1})
    assert "more than the 261 tokens" in message({"actor.objective.divergence.top_k": 300})
    assert "several teachers have no data_sources" in message({"distill.teachers.small.model.path": task.model})
    assert "weights" in message({}, {**DISTILL, "distill.teachers.me.weights": "current"})
    found = message({"distill.on_policy_fraction": 0.5, "actor.old_logprobs": "rollout"})
    assert "completions of the data set do not have" in found
    nothing = write_rows(tmp_path / "nothing.jsonl", 48, response=None)
    found = message({"distill.on_policy_fraction": 0.5, "data.train_files": nothing})
    assert "row 0: the column 'response' must hold one response as text" in found
    empty = write_rows(tmp_path / "empty.jsonl", 48, response="")
    assert "row 0: the response is empty" in message({"distill.on_policy_fraction": 0.5, "data.train_files": empty})
    assert "teacher_NAME" in message({"controller.placement.techer_big": "default"})


def test_responses_that_are_too_long_are_counted(task: Any, teacher: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 40).read_text()
    rows += json.dumps({"prompt": "say", "data_source": "a", "response": "a" * 100}) + "\n"
    (tmp_path / "rows.jsonl").write_text(rows)
    keys: dict[str, Any] = {**DISTILL, "distill.teachers.big.model.path": teacher}
    keys |= {"data.train_files": tmp_path / "rows.jsonl"}
    keys |= {"distill.on_policy_fraction": 0, "trainer.total_steps": 1, "trainer.trackers": "[console,jsonl]"}
    result = task.run("distill", tmp_path / "out", keys)
    assert result.exit_code == 0, result.output
    assert "1 responses are longer than data.max_response_length" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"actor.objective.divergence.kind": "{name: jsd, beta: 0.999}"}, "has hardly any gradient"),
        ({"actor.objective.divergence.kind": "{name: jsd, beta: 1}"}, None),
        ({"distill.on_policy_fraction": 0.5, "reward.name": "gsm8k"}, "compares all samples of a batch"),
    ],
)
def test_what_is_almost_surely_a_mistake_is_doubted(
    task: Any, tmp_path: Path, changes: dict[str, Any], why: str | None
) -> None:
    keys = {**DISTILL, "distill.teachers.big.model.path": task.model, **changes}
    arguments = task.arguments("distill", tmp_path / "out", keys)[2:]
    config = load_config(plugins.get("rlcore.recipes", "distill").config_class(), None, arguments)
    assert (why is None) == (not list(config.doubts()))
    assert why is None or why in str(list(config.doubts()))
