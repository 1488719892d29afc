"""What a user gets wrong: one clear error each, and nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlcore_kit.testing.tiny_model import tiny_model


def fails(task: Any, out_dir: Path, changes: dict[str, Any], *texts: str, recipe: str = "grpo") -> None:
    before = sorted(out_dir.rglob("*"))
    result = task.run(recipe, out_dir, changes)
    message = " ".join(result.output.split())
    assert result.exit_code == 1, message
    assert message.startswith("error:"), message
    for text in texts:
        assert text in message
    assert sorted(out_dir.rglob("*")) == before


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing file": ({"data.train_files": "nowhere.parquet"}, ["nowhere.parquet", "does not exist"]),
    "wrong column": ({"data.prompt_key": "question"}, ["no column 'question'", "prompt, ground_truth"]),
    "unknown key": ({"actor.optim.learning_rate": 1}, ["actor.optim.learning_rate", "unknown key"]),
    "misspelt key": ({"rollout.temprature": 1}, ["rollout.temprature", "did you mean rollout.temperature"]),
    "unknown engine": ({"actor.engine": "fsdq"}, ["actor.engine", "'fsdp'"]),
    "unknown estimator": ({"algorithm.advantage": "grop"}, ["algorithm.advantage", "'grpo'"]),
    "estimator that needs a critic": ({"algorithm.advantage": "gae"}, ["gae needs the values of a critic", "ppo"]),
    "over-long prompt": (
        {"data.max_prompt_length": 4, "data.overlong_prompts": "error"},
        ["row 0", "data.max_prompt_length=4"],
    ),
    "all prompts too long": ({"data.max_prompt_length": 4}, ["none of the 48 prompts", "data.max_prompt_length=4"]),
    "batch larger than the data": (
        {"data.train_batch_size": 64},
        ["data.train_batch_size=64", "48 samples"],
    ),
    "indivisible batch": (
        {"actor.mini_batch_size": 3},
        ["data.train_batch_size=8 is no multiple of actor.mini_batch_size=3", "nearest size that divides it is 2 or 4"],
    ),
    "no validation data": ({"trainer.test_freq": 1, "data.val_files": "[]"}, ["data.val_files is empty"]),
    "interval of zero": ({"trainer.save_freq": 0}, ["trainer.save_freq", "-1 for never"]),
    "two rewards": ({"reward.name": "gsm8k"}, ["reward", "keep one of them"]),
    "unknown controller": (
        {"controller.kind": "rai"},
        ["controller.kind", "unknown executor 'rai'; did you mean 'ray'?"],
    ),
    "unknown tracker": ({"trainer.trackers": "[wandbb]"}, ["trainer.trackers", "'wandb'"]),
    "zero advantage with entropy bonus": (
        {"actor.drop_zero_advantage": True, "actor.objective.entropy_coeff": 0.1},
        ["actor.drop_zero_advantage", "entropy_coeff=0.1"],
    ),
    "weights by the same ratio twice": (
        {"actor.old_logprobs": "rollout", "actor.objective.correction": "tis"},
        ["actor.objective.correction", "{name: mis, weight: one}"],
    ),
    "single completions for an estimator that compares": (
        {"rollout.n": 1},
        ["rollout.n: is 1, and grpo compares", "gae (recipe ppo)", "reinforce_plus_plus, remax"],
    ),
    "missing checkpoint": ({"trainer.resume": "nowhere/step-000001"}, ["nowhere/step-000001"]),
    "missing reward function": ({"reward.path": "nowhere.py:f"}, ["nowhere.py"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(task: Any, tmp_path: Path, case: str) -> None:
    changes, texts = CASES[case]
    fails(task, tmp_path / "out", changes, *texts)


def test_a_reward_without_the_answers_that_it_needs(task: Any, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "q", "answer": "1", "solution": "x = 1"}\n' * 8)
    changes = {"data.train_files": tmp_path / "train.jsonl", "reward.path": None, "reward.name": "gsm8k"}
    texts = [
        "no ground truth: 'answer' and 'solution' could be it",
        "data.ground_truth_key",
        "the reward gsm8k needs it",
    ]
    fails(task, tmp_path / "out", changes, *texts)


def test_all_problems_are_reported_together(task: Any, tmp_path: Path) -> None:
    changes = {"actor.mini_batch_size": 3, "critic.mini_batch_size": 5, "trainer.test_freq": 1, "data.val_files": "[]"}
    texts = ["actor.mini_batch_size=3", "critic.mini_batch_size=5", "data.val_files is empty"]
    fails(task, tmp_path, changes, *texts, recipe="ppo")


def test_empty_file(task: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    fails(task, tmp_path / "out", {"data.train_files": empty}, "empty.jsonl", "no rows")


def test_model_folder_without_tokenizer(task: Any, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(task.model, bare)
    for file in bare.glob("token*"):
        file.unlink()
    fails(task, tmp_path / "out", {"model.path": bare}, "no tokenizer", "model.tokenizer_path")


def test_model_folder_that_is_not_there(task: Any, tmp_path: Path) -> None:
    fails(task, tmp_path / "out", {"model.path": tmp_path / "nowhere"}, "model.path", "nowhere")
    wrong = task.model.with_name("modell")
    fails(task, tmp_path / "out", {"model.path": wrong}, f"no such folder; did you mean {task.model}?")


@pytest.fixture
def finished(task: Any, tmp_path: Path) -> Path:
    """A run of one step with a checkpoint."""
    result = task.run("grpo", tmp_path / "run", {"trainer.total_steps": 1, "trainer.save_freq": 1})
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def test_folder_of_another_run(task: Any, finished: Path) -> None:
    fails(task, finished, {"trainer.resume": "never"}, "holds a run already", "trainer.resume=auto")


def test_folder_of_another_run_without_checkpoints(task: Any, tmp_path: Path) -> None:
    keys = {"trainer.total_steps": 1, "trainer.save_hf": "true"}
    assert task.run("grpo", tmp_path, keys).exit_code == 0
    fails(task, tmp_path, {**keys, "seed": 7}, "holds another run that is complete", "seed")
    own = {"model.path": tmp_path / "model", "model.tokenizer_path": task.model}
    fails(task, tmp_path, {**keys, **own}, f"model.path={tmp_path}/model is where the run would write", "save_hf")


def test_checkpoint_of_another_run_does_not_continue_in_a_taken_folder(
    task: Any, tmp_path: Path, finished: Path
) -> None:
    assert task.run("grpo", tmp_path / "taken", {"trainer.total_steps": 1}).exit_code == 0
    step = finished / "checkpoints" / "step-000001"
    fails(task, tmp_path / "taken", {"trainer.resume": step}, "holds a run already", "is of another")


def test_folder_that_cannot_be_written(task: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(task, tmp_path / "file" / "below", {}, "cannot be created")


def test_checkpoint_of_another_model(task: Any, tmp_path: Path, finished: Path) -> None:
    other = tiny_model(tmp_path / "wider", hidden_size=64)
    step = finished / "checkpoints" / "step-000001"
    fails(task, tmp_path / "out", {"model.path": other, "trainer.resume": step}, "step-000001/actor")


def test_checkpoint_of_another_recipe(task: Any, tmp_path: Path, finished: Path) -> None:
    step = finished / "checkpoints" / "step-000001"
    fails(task, tmp_path / "out", {"trainer.resume": step}, "is of the recipe grpo, not ppo", recipe="ppo")


def test_truncated_checkpoint(
    task: Any, tmp_path: Path, finished: Path, metrics_of: Callable[[Path], list[dict[str, float]]]
) -> None:
    step = finished / "checkpoints" / "step-000001"
    largest = max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    fails(task, tmp_path / "out", {"trainer.resume": step}, largest.name, "bytes instead of")
    before = metrics_of(finished)
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
        fails(task, finished, {}, "no checkpoint in", "is complete", "move them away")
    assert metrics_of(finished) == before
