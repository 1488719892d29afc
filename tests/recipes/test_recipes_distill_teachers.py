"""Distillation from teachers that run as servers, and from teachers with another tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlcore_kit.testing.inference_peer import OpenAIPeer
from rlcore_kit.testing.tiny_model import SPECIAL_TOKENS

Metrics = Callable[[Path], list[dict[str, float]]]
FIRST = len(SPECIAL_TOKENS)
"""The first token that is no special one."""
DISTILL = {
    "reward.path": None,
    "reward.workers": None,
    "rollout.n": 1,
    "data.train_batch_size": 16,
    "data.val_files": None,
    "trainer.total_steps": 12,
    "actor.optim.lr": 1e-2,
}
TOP = {"actor.objective.divergence": "{kind: {name: jsd, beta: 0.5}, top_k: 8}"}
BY_GRADIENT = {"actor.objective.divergence.coeff": 0, "distill.advantage_coeff": 1}


@pytest.fixture(scope="module")
def renumbered(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose tokens (but the special ones) have other numbers."""
    folder: Path = tmp_path_factory.mktemp("renumbered") / "model"
    shutil.copytree(teacher, folder)
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    last = FIRST + 255
    described["model"]["vocab"] = {
        token: number if number < FIRST or number > last else FIRST + last - number
        for token, number in vocabulary.items()
    }
    file.write_text(json.dumps(described))
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name][FIRST : last + 1] = weights[name][FIRST : last + 1].flip(0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def served(teacher: Path) -> Iterator[OpenAIPeer]:
    peer = OpenAIPeer(teacher)
    yield peer
    peer.stop()


def by_url(*peers: OpenAIPeer, **options: Any) -> dict[str, Any]:
    section = {"urls": [peer.url for peer in peers], **options}
    return {"distill.teachers.big.scoring.http": json.dumps(section)}


def test_a_teacher_by_url_teaches_what_it_teaches_in_process(
    task: Any, teacher: Path, served: OpenAIPeer, metrics_of: Metrics, tmp_path: Path
) -> None:
    """Its 8 likeliest tokens; a request that breaks is made again."""
    second = OpenAIPeer(served.model)
    second.faults = ["", "", 500]  # after the first requests of the check and of the run
    result = task.run("distill", tmp_path / "served", {**DISTILL, **TOP, **by_url(served, second)})
    assert result.exit_code == 0, result.output
    assert second.faults == []
    second.stop()
    here = {"distill.teachers.big.model.path": teacher}
    result = task.run("distill", tmp_path / "here", {**DISTILL, **TOP, **here, "trainer.total_steps": 2})
    assert result.exit_code == 0, result.output
    lines, others = metrics_of(tmp_path / "served"), metrics_of(tmp_path / "here")
    for line, other in zip(lines[:2], others, strict=True):
        assert line["actor/divergence"] == pytest.approx(other["actor/divergence"], rel=1e-3)
        assert line["actor/teacher_top_mass"] == pytest.approx(other["actor/teacher_top_mass"], abs=1e-4)
    divergences = [line["actor/divergence"] for line in lines]
    assert sum(divergences[-3:]) < 0.6 * sum(divergences[:3]), divergences


def test_two_processes_ask_for_each_completion_once(
    task: Any, served: OpenAIPeer, metrics_of: Metrics, tmp_path: Path
) -> None:
    changes = {**DISTILL, **TOP, **by_url(served), "trainer.total_steps": 1, "actor.fsdp.device": "cpu"}
    ranks = task.fork("distill", tmp_path, changes, processes=2)
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    asked = [body["prompt"] for _, body in served.asked if "prompt_logprobs" in body]
    assert len([prompt for prompt in asked if served.model.tokenizer.decode(prompt).startswith("<|user|>")]) == 16
    assert len(metrics_of(tmp_path)) == 1


def test_a_teacher_with_other_tokens_teaches_by_their_texts(
    task: Any, renumbered: Path, metrics_of: Metrics, tmp_path: Path
) -> None:
    cross = {"distill.teachers.big.model.path": renumbered, "distill.teachers.big.cross_tokenizer": True}
    result = task.run("distill", tmp_path, {**DISTILL, **BY_GRADIENT, **cross, "trainer.total_steps": 20})
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path)
    found = [line["distill/sampled_reverse_kl"] for line in lines]
    assert sum(found[-3:]) < 0.6 * sum(found[:3]), found


def test_a_teacher_with_the_students_weights_and_other_tokens_agrees(
    task: Any, teacher: Path, renumbered: Path, metrics_of: Metrics, tmp_path: Path
) -> None:
    """By URL: what it reads there are its own tokens."""
    peer = OpenAIPeer(renumbered)
    cross = {
        "distill.teachers.big.model.path": renumbered,
        "distill.teachers.big.cross_tokenizer": True,
        **by_url(peer),
    }
    changes = {**DISTILL, **BY_GRADIENT, **cross, "model.path": teacher, "trainer.total_steps": 1}
    result = task.run("distill", tmp_path, changes)
    peer.stop()
    assert result.exit_code == 0, result.output
    (line,) = metrics_of(tmp_path)
    assert line["distill/chunked_fraction"] > 0.95
    assert abs(line["distill/sampled_reverse_kl"]) < 1e-3
    asked = [body["prompt"] for _, body in peer.asked if "prompt_logprobs" in body]
    assert peer.model.tokenizer.decode(asked[-1]).startswith("<|user|>say ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "actor.objective.divergence.top_k: is null (the whole vocabulary), which the scoring engine"),
        ({**TOP, "rollout.temperature": 0.7}, "rollout.temperature: is 0.7, but the scoring engine of the teacher big"),
        ({**TOP}, "http://127.0.0.1:9 accepts no connection"),
        (
            {**TOP, "distill.teachers.big.offload": True},
            "distill.teachers.big.offload: is for a teacher in a training engine, and this one has scoring: remove one",
        ),
        (
            {"distill.teachers.big.model.path": "big", "distill.teachers.big.cross_tokenizer": True},
            "actor.objective.divergence.coeff: is 1, but the teacher big has other tokens (cross_tokenizer)",
        ),
        (
            {"distill.teachers.big.cross_tokenizer": True},
            "distill.teachers.big.model: is null, and cross_tokenizer needs the teacher's tokenizer",
        ),
        (
            {"distill.teachers.big.scoring.http": '{urls: ["http://10.1.2.3"]}', **TOP},
            "http://10.1.2.3 is not on this machine; set allow_remote",
        ),
    ],
)
def test_mistakes_are_named_before_the_run(task: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    section = {"distill.teachers.big.scoring.http": '{urls: ["http://127.0.0.1:9"], retries: 0}'}
    result = task.run("distill", tmp_path, {**DISTILL, **section, **changes})
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())


def test_what_a_server_does_not_have_is_named_before_the_run(
    task: Any, teacher: Path, renumbered: Path, served: OpenAIPeer, tmp_path: Path
) -> None:
    served.max_logprobs = 4
    result = task.run("distill", tmp_path, {**DISTILL, **TOP, **by_url(served)})
    assert "does not give the 8 likeliest tokens; start it with --max-logprobs 8" in " ".join(result.output.split())
    other = {"distill.teachers.big.model.path": renumbered}
    result = task.run("distill", tmp_path, {**DISTILL, **TOP, **by_url(served), **other})
    output = " ".join(result.output.split())
    assert "distill.teachers.big: the teacher's tokenizer differs from the student's in 256 tokens (5 is " in output
    assert "set distill.teachers.big.cross_tokenizer=true" in output
