"""Supervised fine-tuning from end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlcore.cli.command_tree import cli


@pytest.fixture(scope="module")
def keys(task: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sources in one file, one of which is easy to learn."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": [{"role": "user", "content": f"say {n}"}], "response": "abcd" if n % 3 else f"{n * 7919 % 1000}",
         "data_source": "letters" if n % 3 else "digits"}
        for n in range(48)
    ]  # fmt: skip
    for name, part in (("train", rows), ("val", rows[:12])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {
        **dict.fromkeys(task.keys),
        "model.path": task.model,
        "data.train_files": folder / "train.jsonl",
        "data.val_files": folder / "val.jsonl",
        "data.train_batch_size": 8,
        "trainer.trackers": "[jsonl]",
        "trainer.total_steps": 8,
        "trainer.test_freq": 4,
        "actor.optim.lr": 1e-2,
    }


def test_loss_is_measured_by_source_and_data_tokenised_before_gives_the_same_run(
    task: Any, tmp_path: Path, keys: dict[str, Any], metrics_of: Any
) -> None:
    assert task.run("sft", tmp_path / "raw", keys).exit_code == 0
    raw = metrics_of(tmp_path / "raw")
    losses = [row["val/loss"] for row in raw if "val/loss" in row]
    assert len(losses) > 1
    assert losses == sorted(losses, reverse=True)
    assert {"val/loss/letters", "val/loss/digits", "timing_s/data", "train/learned_ratio"} <= {*raw[-1]}
    assert raw[-1]["val/loss/letters"] < raw[-1]["val/loss"] < raw[-1]["val/loss/digits"]

    files = [f"{key}={keys[key]}" for key in ("model.path", "data.train_files", "data.val_files")]
    result = CliRunner().invoke(cli, ["data", "tokenize", "--out", str(tmp_path / "data"), *files])
    assert result.exit_code == 0, result.output
    tokenised = {**keys, "data.train_files": tmp_path / "data" / "train", "data.val_files": tmp_path / "data" / "val"}
    for steps in (5, 8):  # the second continues after a checkpoint
        changes = {**tokenised, "trainer.total_steps": steps, "trainer.save_freq": 5}
        assert task.run("sft", tmp_path / "tokenised", changes).exit_code == 0
    found = {row["step"]: row for row in metrics_of(tmp_path / "tokenised")}
    for row in raw:
        for name in {"train/loss", "train/learned_tokens", "val/loss/letters"} & {*row}:
            assert found[row["step"]][name] == row[name], name


def test_noise_on_embeddings_is_repeated_after_a_resume(
    task: Any, tmp_path: Path, keys: dict[str, Any], metrics_of: Any
) -> None:
    noisy = {**keys, "actor.objective.neftune_alpha": 10, "trainer.test_freq": -1, "trainer.total_steps": 4}
    for folder, steps in (("whole", [4]), ("resumed", [2, 4])):
        for number in steps:
            changes = {**noisy, "trainer.total_steps": number, "trainer.save_freq": 2}
            assert task.run("sft", tmp_path / folder, changes).exit_code == 0
    losses = [[row["train/loss"] for row in metrics_of(tmp_path / folder)] for folder in ("whole", "resumed")]
    assert losses[0] == losses[1]
    assert task.run("sft", tmp_path / "clean", {**noisy, "actor.objective.neftune_alpha": 0}).exit_code == 0
    assert metrics_of(tmp_path / "clean")[0]["train/loss"] != losses[0][0]


def test_sources_of_one_file_are_mixed_by_shares(
    task: Any, tmp_path: Path, keys: dict[str, Any], metrics_of: Any
) -> None:
    changes = {**keys, "data.mix": "{letters: 1, digits: 0.001}", "trainer.test_freq": -1, "trainer.total_steps": 6}
    assert task.run("sft", tmp_path / "letters", changes).exit_code == 0
    counts = {row["train/learned_tokens"] for row in metrics_of(tmp_path / "letters")}
    assert counts == {8 * 5.0}, "letters alone: four characters and the end token"
    result = task.run("sft", tmp_path / "wrong", {**changes, "data.mix": "{letters: 1, odd: 2}"})
    assert "data.mix has no share for the data source digits" in result.output
    result = task.run("sft", tmp_path / "wrong", {**changes, "data.mix": "{letters: 1, digits: 1, odd: 2}"})
    assert "data.mix names odd, and the train files have only digits, letters" in result.output


def test_completions_of_held_out_prompts_are_logged_and_scored(
    task: Any, tmp_path: Path, keys: dict[str, Any], metrics_of: Any
) -> None:
    changes = {**keys, "trainer.total_steps": 30, "trainer.test_freq": 15, "rollout.max_response_length": 8}
    plain = {**changes, "trainer.log_val_generations": 4}
    result = task.run("sft", tmp_path / "plain", plain)
    assert result.exit_code == 0, result.output
    scored = {**changes, "reward.path": f"{task.reward}:compute_score", "reward.workers": 1}
    assert task.run("sft", tmp_path / "scored", scored).exit_code == 0
    first, *_, last = [row for row in metrics_of(tmp_path / "scored") if "val/loss" in row]
    assert last["val-core/letters/reward/mean@1"] > first["val-core/letters/reward/mean@1"]
    equal = [row for row in metrics_of(tmp_path / "plain") if "val/loss" in row][-1]
    assert equal["val/loss"] == last["val/loss"], "generation changes no training"
    lines = (tmp_path / "plain" / "tables" / "val-generations.jsonl").read_text().splitlines()
    tables = [json.loads(line) for line in lines]
    last_step = tables[-1]["step"]
    rows = [row for row in tables if row["step"] == last_step]
    assert len(rows) == 4
    assert all(row["prompt"].endswith("<|assistant|>") for row in rows)
    assert all(row["score"] == (row["completion"] == row["ground_truth"]) for row in rows)
    assert ("abcd", 1.0) in {(row["completion"], row["score"]) for row in rows}


def test_adapters_learn_and_generate(task: Any, tmp_path: Path, keys: dict[str, Any], metrics_of: Any) -> None:
    changes = {"actor.fsdp.lora.rank": 8, "trainer.log_val_generations": 2, "rollout.max_response_length": 8}
    assert task.run("sft", tmp_path / "out", {**keys, **changes}).exit_code == 0
    losses = [row["val/loss"] for row in metrics_of(tmp_path / "out") if "val/loss" in row]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"trainer.test_freq": -1, "trainer.log_val_generations": 2},
            "trainer.log_val_generations: this recipe generates",
        ),
        ({"rollout.n": 2}, "rollout: has no effect without trainer.log_val_generations"),
        ({"reward.name": "math", "trainer.test_freq": -1}, "reward: has no effect without trainer.test_freq"),
    ],
)
def test_settings_of_generations_without_any_are_refused(
    task: Any, tmp_path: Path, keys: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    assert problem in task.run("sft", tmp_path / "out", {**keys, **changes}).output
