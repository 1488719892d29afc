"""Preference optimisation: what a tiny model learns from pairs and from labels, however the work is divided."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

Read = Callable[[Path], list[dict[str, float]]]


@pytest.fixture(scope="module")
def keys(task: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pairs whose chosen answers are letters and whose rejected ones are digits; answers of many lengths."""
    folder = tmp_path_factory.mktemp("preferences")
    rng = random.Random(0)

    def write(name: str, rows: int) -> Path:
        def answer(alphabet: str) -> str:
            return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 9)))

        pairs = [
            {
                "prompt": [{"role": "user", "content": f"say {number}"}],
                "chosen": answer("abcdef"),
                "rejected": answer("123456"),
                "data_source": ("even", "odd")[number % 2],
            }
            for number in range(rows)
        ]
        path = folder / name
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        return path

    unused = ("data.max_prompt_length", "data.max_response_length", "rollout.n", "reward.path", "reward.workers")
    return {
        **dict.fromkeys(unused),
        "data.train_files": write("train.jsonl", 24),
        "data.val_files": write("test.jsonl", 7),
        "data.train_batch_size": 5,
        "actor.optim.lr": 1e-3,
        "trainer.total_steps": 4,
        "trainer.test_freq": 4,
        "trainer.system_metrics_s": None,
    }


def learned(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """The metrics of training and validation alone."""
    return [{name: value for name, value in line.items() if name.startswith(("train/", "val"))} for line in lines]


@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo", "apo-zero-unpaired"])
def test_preferred_answers_become_more_likely(
    task: Any, keys: dict[str, Any], metrics_of: Read, tmp_path: Path, loss: str
) -> None:
    changes = {**keys, "actor.objective.loss": loss, "data.train_batch_size": 12, "trainer.total_steps": 8}
    result = task.run("dpo", tmp_path, {**changes, "trainer.test_freq": 8})
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path)
    before, after, first = lines[0], lines[-1], lines[1]
    assert after["val/loss"] < before["val/loss"]
    assert after["val/rewards/margins"] > before["val/rewards/margins"]
    measured = "accuracies" if loss in ("dpo", "orpo") else "margins"
    for source in ("even", "odd"):
        assert after[f"val-core/{source}/rewards/{measured}"] > max(before[f"val-core/{source}/rewards/{measured}"], 0)
    if loss != "orpo":
        # at the first step the policy is the reference, to the last bit
        assert first["train/rewards/chosen"] == first["train/rewards/rejected"] == before["val/rewards/chosen"] == 0
    if loss == "kto":
        assert first["train/kl"] == 0 <= after["train/kl"]
    assert ("timing_s/ref" in first) == (loss != "orpo")


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_micro_batches_and_ranks_change_nothing(
    task: Any, keys: dict[str, Any], metrics_of: Read, tmp_path: Path, loss: str
) -> None:
    """Five pairs: one rank has three of them. The KL divergence of KTO is one number over both ranks."""
    changes = {**keys, "actor.objective.loss": loss, "actor.objective.sft_coeff": 0.1}
    ranks = task.fork("dpo", tmp_path / "ranks", changes, processes=2)
    whole = task.run("dpo", tmp_path / "whole", changes)
    assert whole.exit_code == 0, whole.output
    small = {**changes, "actor.max_tokens_per_micro_batch": 30, "ref.max_tokens_per_micro_batch": 30}
    assert task.run("dpo", tmp_path / "small", {**small, "data.val_batch_size": 3}).exit_code == 0
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    expected = learned(metrics_of(tmp_path / "whole"))
    for other in ("small", "ranks"):
        for line, found in zip(expected, learned(metrics_of(tmp_path / other)), strict=True):
            assert found == pytest.approx(line, rel=1e-3, abs=1e-5), other


def test_workers_of_ray_compute_the_same(
    task: Any, keys: dict[str, Any], metrics_of: Read, tmp_path: Path, cluster: None
) -> None:
    changes = {**keys, "actor.objective.loss": "kto", "precompute_ref": True, "trainer.total_steps": 2}
    changes |= {"trainer.test_freq": 2, "data.val_batch_size": 4}
    assert task.run("dpo", tmp_path / "local", changes).exit_code == 0
    pools = {"all": {"processes": 2, "cpus_per_process": 0.5}}
    result = task.run("dpo", tmp_path / "ray", {**changes, "controller.kind": "ray", "controller.pools": pools})
    assert result.exit_code == 0, result.output
    expected, found = (learned(metrics_of(tmp_path / run)) for run in ("local", "ray"))
    for line, other in zip(expected, found, strict=True):
        assert other == pytest.approx(line, rel=1e-3, abs=1e-5)


def test_megatron_computes_the_same(task: Any, keys: dict[str, Any], metrics_of: Read, tmp_path: Path) -> None:
    adam = {"actor.optim": {"lr": 1e-3, "eps": 1e-4}, "actor.optim.lr": None}
    changes = {**keys, **adam, "trainer.total_steps": 2, "trainer.test_freq": 2}
    options = {"device": "cpu", "tensor_parallel": 2}
    megatron = {"actor.engine": "megatron", "actor.megatron": options}
    ranks = task.fork("dpo", tmp_path / "megatron", {**changes, **megatron}, processes=2)
    assert task.run("dpo", tmp_path / "fsdp", changes).exit_code == 0
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    expected, found = learned(metrics_of(tmp_path / "fsdp")), learned(metrics_of(tmp_path / "megatron"))
    assert found[2] == pytest.approx(expected[2], rel=1e-3, abs=1e-4)
    # before the first update only rounding is between policy and reference, and decides who has the higher reward
    for metrics in (found[0]["val/loss"], found[1]["train/loss"]):
        assert metrics == pytest.approx(math.log(2), abs=1e-6)


def test_precomputed_references_are_kept_and_a_resumed_run_is_the_same(
    task: Any, keys: dict[str, Any], metrics_of: Read, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(task.model, model)
    changes = {**keys, "model.path": model, "actor.objective.loss": "kto", "trainer.save_hf": True}
    assert task.run("dpo", tmp_path / "computed", changes).exit_code == 0
    stopped = {**changes, "precompute_ref": True, "trainer.save_freq": 2}
    first = task.run("dpo", tmp_path / "run", {**stopped, "trainer.total_steps": 2, "trainer.save_hf": False})
    assert first.exit_code == 0, first.output
    assert "computing reference log-probs of 48 training samples" in first.output
    resumed = task.run("dpo", tmp_path / "run", stopped)
    assert resumed.exit_code == 0, resumed.output
    assert "reference log-probs of 48 training samples from" in resumed.output
    assert "computing" not in resumed.output
    expected, found = (load_file(tmp_path / run / "model/model.safetensors") for run in ("computed", "run"))
    assert all(expected[name].equal(found[name]) for name in expected)
    # a damaged file and other weights are noticed
    [file] = (tmp_path / "run/reference").glob("training-*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    again = {**stopped, "trainer.total_steps": 5}
    assert "are computed again" in task.run("dpo", tmp_path / "run", again).output
    shutil.copy(tmp_path / "computed/model/model.safetensors", model)
    other = task.run("dpo", tmp_path / "run", {**again, "trainer.total_steps": 6})
    assert "are of another model or of other training samples" in other.output


def test_a_model_with_adapters_is_its_own_reference(
    task: Any, keys: dict[str, Any], metrics_of: Read, tmp_path: Path
) -> None:
    changes = {**keys, "actor.fsdp.lora.rank": 4, "actor.optim.lr": 1e-2}
    for name, precompute in (("step", False), ("before", True)):
        result = task.run("dpo", tmp_path / name, {**changes, "precompute_ref": precompute})
        assert result.exit_code == 0, result.output
        assert "ref up to" not in result.output
    lines = learned(metrics_of(tmp_path / "step"))
    assert lines[1]["train/rewards/margins"] == 0
    assert lines[-1]["val/rewards/margins"] > 0
    assert learned(metrics_of(tmp_path / "before")) == lines


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"actor.objective.loss": "simpo", "precompute_ref": True}, ["precompute_ref", "simpo has no reference"]),
        ({"actor.objective.loss": "kto", "data.train_batch_size": 1}, ["data.train_batch_size", "set it to 2 or more"]),
        ({"data.label_key": "good"}, ["data.label_key", "the loss dpo does not read"]),
        ({"data.margin_key": "gap"}, ["data.margin_key", "the loss dpo does not read"]),
        ({"actor.objective.loss": "odpo"}, ["data.margin_key", "must name the column"]),
        ({"actor.objective.loss": "{name: dpo, beta: 0}"}, ["beta", "greater than 0"]),
        ({"actor.objective.loss": "orpo", "ref.model.path": "x"}, ["ref.model", "never be loaded"]),
    ],
)
def test_settings_that_do_nothing_are_refused(
    task: Any, keys: dict[str, Any], tmp_path: Path, changes: dict[str, Any], messages: list[str]
) -> None:
    result = task.run("dpo", tmp_path / "run", {**keys, **changes})
    assert result.exit_code != 0
    assert all(message in " ".join(result.output.split()) for message in messages), result.output
    assert not (tmp_path / "run").exists()


def test_a_file_without_pairs_leads_to_the_loss_for_it(task: Any, keys: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b", "label": True}) + "\n")
    result = task.run("dpo", tmp_path / "run", {**keys, "data.train_files": path})
    assert "has single answers with labels" in result.output
    assert "actor.objective.loss=kto" in result.output


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"actor.objective.loss": "kto"}, ["actor.objective.loss", "learns from single answers"]),
        ({"rollout.n": 1}, ["rollout.n", "set it to 2 or more"]),
        ({"actor.objective.loss": "simpo", "ref.model.path": "x"}, ["ref.model", "never be loaded"]),
        ({"algorithm.advantage": "grpo"}, ["algorithm.advantage", "unknown key"]),
        ({"actor.old_logprobs": "rollout"}, ["actor.old_logprobs", "unknown key"]),
    ],
)
def test_settings_without_a_meaning_for_pairs_of_completions_are_refused(
    task: Any, tmp_path: Path, changes: dict[str, Any], messages: list[str]
) -> None:
    result = task.run("online_dpo", tmp_path / "run", changes)
    assert result.exit_code != 0
    assert all(message in " ".join(result.output.split()) for message in messages), result.output


def test_self_play_learns_demonstrations_and_a_resumed_run_is_the_same(
    task: Any, metrics_of: Read, tmp_path: Path
) -> None:
    """Demonstrations are "abcd", of which half of the reward's eight letters are lower case."""
    changes = {"data.train_batch_size": 16, "actor.optim.lr": 1e-2, "rollout.n": 3, "algorithm.iteration_steps": 5}
    changes |= {"trainer.total_steps": 14, "trainer.save_hf": True}
    undisturbed = task.run("spin", tmp_path / "whole", changes)
    assert undisturbed.exit_code == 0, undisturbed.output
    lines = metrics_of(tmp_path / "whole")
    assert lines[0]["critic/score/mean"] < 0.15
    assert sum(line["critic/score/mean"] for line in lines[-3:]) / 3 > 0.3
    assert [line["actor/rewards/margins"] == 0 for line in lines] == [number % 5 == 0 for number in range(14)]
    stopped = {**changes, "trainer.save_freq": 7, "trainer.save_hf": False, "trainer.total_steps": 7}
    assert task.run("spin", tmp_path / "run", stopped).exit_code == 0
    resumed = task.run("spin", tmp_path / "run", {**stopped, "trainer.total_steps": 14, "trainer.save_hf": True})
    assert resumed.exit_code == 0, resumed.output
    expected, found = (load_file(tmp_path / run / "model/model.safetensors") for run in ("whole", "run"))
    assert all(expected[name].equal(found[name]) for name in expected)
    assert sorted(path.name for path in (tmp_path / "run/opponents").iterdir()) == ["step-000005", "step-000010"]
    shutil.rmtree(tmp_path / "run/opponents")
    lost = task.run("spin", tmp_path / "run", {**stopped, "trainer.total_steps": 15})
    assert "wrote the opponent of its iteration there" in lost.output


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"actor.fsdp.lora.rank": 4, "algorithm.iteration_steps": 5}, ["algorithm.iteration_steps", "leave it out"]),
        ({"actor.objective.loss": "odpo"}, ["actor.objective.loss", "needs margins"]),
        ({"algorithm.response_key": "text"}, ["must hold one response as text, not None"]),
    ],
)
def test_self_play_without_what_it_needs_is_refused(
    task: Any, tmp_path: Path, changes: dict[str, Any], messages: list[str]
) -> None:
    result = task.run("spin", tmp_path / "run", changes)
    assert result.exit_code != 0
    assert all(message in " ".join(result.output.split()) for message in messages), result.output
