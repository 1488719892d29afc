"""Reward models: trained on pairs, and then the reward of PPO."""

from __future__ import annotations

import json
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from rlcore.cli.command_tree import cli
from rlcore_recipes.data.end_tokens import save_tokenizer

WITHOUT_ROLLOUTS = dict.fromkeys(
    ["data.max_prompt_length", "data.max_response_length", "rollout.n", "reward.path", "reward.workers"]
)


PPO: dict[str, Any] = {"reward.path": None, "reward.workers": None, "reward.name": "none"}


def answer(chance: random.Random) -> str:
    """Up to twelve characters, of which some share is lower-case letters."""
    share = chance.random()
    letters = (string.ascii_lowercase, string.ascii_uppercase + string.digits + string.punctuation)
    return "".join(chance.choice(letters[chance.random() > share]) for _ in range(chance.randint(1, 12)))


def lower(text: str) -> float:
    return sum(c.isascii() and c.islower() for c in text[:8]) / 8


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """Pairs of which the side with more lower-case letters is preferred, of two data sources."""
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        sides = sorted((answer(chance), answer(chance)), key=lower)
        if lower(sides[1]) - lower(sides[0]) > 0.2:
            prompt = [{"role": "user", "content": f"say {chance.randint(10, 99)}"}]
            rows.append(
                {"prompt": prompt, "chosen": sides[1], "rejected": sides[0], "data_source": f"s{len(rows) % 2}"}
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def keys(task: Any) -> dict[str, Any]:
    return {
        **WITHOUT_ROLLOUTS,
        "data.train_files": write_pairs(task.folder / "pairs.jsonl", 1024, 0),
        "data.val_files": write_pairs(task.folder / "held_out.jsonl", 48, 1),
        "data.train_batch_size": 32,
        "data.max_length": 16,
        "data.overlong": "truncate",
        "actor.optim.lr": 3e-3,
        "trainer.total_steps": 48,
        "trainer.test_freq": 24,
        "trainer.save_hf": "true",
    }


@pytest.fixture(scope="module")
def trained(task: Any, keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm")
    with pytest.warns(UserWarning, match="scalar head is new"):
        result = task.run("rm", folder, keys)
    assert result.exit_code == 0, result.output
    return folder


def test_the_accuracy_on_held_out_pairs_rises(trained: Path, metrics_of: Callable[[Path], Any]) -> None:
    lines = [line for line in metrics_of(trained) if "val/accuracy" in line]
    assert lines[0]["val/accuracy"] < 0.7
    assert lines[-1]["val/accuracy"] > 0.9
    assert lines[-1]["val/loss"] < 0.4
    both = [lines[-1][f"val-core/s{source}/accuracy"] for source in (0, 1)]
    assert sum(both) / 2 == pytest.approx(lines[-1]["val/accuracy"])
    assert lines[-1]["val/margin"] == pytest.approx(lines[-1]["val/score_chosen"] - lines[-1]["val/score_rejected"])


@pytest.mark.filterwarnings("ignore:the scalar head is new")
def test_adapters_and_the_head_are_trained_and_exported(
    task: Any, keys: dict[str, Any], tmp_path: Path, metrics_of: Callable[[Path], Any]
) -> None:
    """The exported reward model scores as the trained one did; the frozen weights stay."""
    lora = {"device": "cpu", "lora": {"rank": 8, "alpha": 16}}
    changes = {**keys, "actor.fsdp": lora, "actor.optim.lr": 2e-2, "trainer.total_steps": 48}
    result = task.run("rm", tmp_path, changes)
    assert result.exit_code == 0, result.output
    lines = [line for line in metrics_of(tmp_path) if "val/accuracy" in line]
    assert lines[-1]["val/accuracy"] > max(0.85, lines[0]["val/accuracy"])
    start, merged = (load_file(folder / "model.safetensors") for folder in (task.model, tmp_path / "model"))
    for name, tensor in start.items():
        assert name == "lm_head.weight" or torch.equal(merged[name], tensor) is not name.endswith("_proj.weight"), name
    adapter = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    assert torch.equal(adapter["base_model.model.score.weight"], merged["score.weight"])


def test_ppo_with_the_reward_model_improves_what_it_was_trained_on(
    task: Any, trained: Path, tmp_path: Path, metrics_of: Callable[[Path], Any]
) -> None:
    changes = {
        **PPO,
        "reward_model.model.path": trained / "model",
        "critic.model.path": trained / "model",
        "critic.optim.lr": 3e-3,
        "actor.optim.lr": 1e-2,
        "data.train_batch_size": 16,
        "trainer.total_steps": 25,
        "trainer.log_rollouts": -1,
    }
    result = task.run("ppo", tmp_path, changes)
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path)
    assert lines[-1]["critic/score/mean"] == lines[-1]["reward_model/score/mean"] > lines[0]["critic/score/mean"] + 1
    rollouts = [json.loads(line) for line in (tmp_path / "tables" / "rollouts.jsonl").read_text().splitlines()]
    shares = {step: [lower(row["completion"]) for row in rollouts if row["step"] == step] for step in (1, 25)}
    assert sum(shares[1]) / len(shares[1]) < 0.2
    assert sum(shares[25]) / len(shares[25]) > 0.8


def write_labels(path: Path, count: int, seed: int, by_step: bool) -> Path:
    """Answers whose label is their share of lower-case letters, or whose steps are right if they are lower-case.

    Most answers have their length, too, as a second label.
    """
    chance, rows = random.Random(seed), list[dict[str, Any]]()
    for _ in range(count):
        labels = [chance.random() < 0.5 for _ in range(chance.randint(1, 4))]
        kinds = [string.ascii_lowercase if label else string.ascii_uppercase for label in labels]
        steps = ["".join(chance.choices(kind, k=chance.randint(1, 4))) for kind in kinds]
        answer = {"completions": steps, "labels": labels}
        text = "".join(steps)
        one = {"response": text, "score": lower(text), "length": len(text) / 16 if chance.random() < 0.9 else None}
        rows.append({"prompt": "say ", **(answer if by_step else one)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_labels_of_answers_and_steps_are_learned(
    task: Any, keys: dict[str, Any], metrics_of: Callable[[Path], Any], tmp_path: Path, loss: str
) -> None:
    changes = {
        "actor.objective.loss": loss,
        "data.train_files": write_labels(tmp_path / "train.jsonl", 512, 0, loss == "bce"),
        "data.val_files": write_labels(tmp_path / "val.jsonl", 32, 1, loss == "bce"),
        "data.max_length": 64,
        "data.step_separator": "; ",
        **({"data.label_key": ["score", "length"]} if loss == "mse" else {}),
        "trainer.total_steps": 40,
        "trainer.save_hf": "true",
    }
    result = task.run("rm", tmp_path / "out", {**keys, **changes})
    assert result.exit_code == 0, result.output
    lines = [line for line in metrics_of(tmp_path / "out") if "val/loss" in line]
    assert lines[-1]["val/loss"] < 0.5 * lines[0]["val/loss"]
    assert lines[-1]["val/accuracy"] > 0.85 if loss == "bce" else lines[-1]["val/absolute_error"] < 0.2
    if loss == "mse":
        assert max(lines[-1][f"val/{name}/absolute_error"] for name in ("score", "length")) < 0.2
        model = {"reward_model.model.path": tmp_path / "out" / "model", "reward_model.weights": [1, -1]}
        model |= {"trainer.total_steps": 2, "reward_model.coeff": 10}
        assert task.run("ppo", tmp_path / "ppo", {**PPO, **model}).exit_code == 0
        refused = task.run("ppo", tmp_path / "refused", {**PPO, **model, "reward_model.weights": 1})
        assert "set reward_model.weights to 2 factors, one for each label" in " ".join(refused.output.split())
    if loss == "bce":
        model = {"reward_model.model.path": tmp_path / "out" / "model", "reward_model.steps.separator": "a"}
        assert task.run("ppo", tmp_path / "ppo", {**PPO, **model, "trainer.total_steps": 2}).exit_code == 0
        line = metrics_of(tmp_path / "ppo")[-1]
        assert 1 <= line["reward_model/steps/mean"] < 2, "random completions have an a here and there"
        assert 0 < line["critic/score/mean"] < line["reward_model/steps/mean"], "a sum of probabilities"
        assert line["critic/rewards/mean"] == pytest.approx(line["critic/score/mean"])
    other = task.run("rm", tmp_path / "other", {**keys, **changes, "actor.objective.loss": "bradley_terry"})
    assert other.exit_code == 1
    reason = (
        "actor.objective.loss=bce (or mse) learns from them" if loss == "bce" else "learns from pairs; take mse or bce"
    )
    assert reason in " ".join(other.output.split())


def test_the_model_is_a_sequence_classifier_of_transformers(trained: Path, keys: dict[str, Any], task: Any) -> None:
    """Scores of padded text, as transformers users compute them, order held-out pairs as the last validation did."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = trained / "model"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    save_tokenizer(tokenizer, (), folder)
    assert json.loads((folder / "config.json").read_text()) == config, "padding is named where it is missing"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = [json.loads(line) for line in Path(keys["data.val_files"]).read_text().splitlines()]
    right = 0
    for row in rows:
        turns = [[*row["prompt"], {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
        with torch.no_grad():
            chosen, rejected = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
        right += bool(chosen > rejected)
    assert right / len(rows) > 0.8


def test_a_resumed_run_ends_with_the_same_weights(task: Any, keys: dict[str, Any], tmp_path: Path) -> None:
    short = {**keys, "trainer.test_freq": -1, "trainer.save_freq": 2, "trainer.total_steps": 4}
    assert task.run("rm", tmp_path / "whole", short).exit_code == 0
    assert task.run("rm", tmp_path / "parts", {**short, "trainer.total_steps": 2}).exit_code == 0
    again = task.run("rm", tmp_path / "parts", short)
    assert "continuing after step 2" in again.output
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    exported = CliRunner().invoke(cli, ["export", str(tmp_path / "parts"), "--out", str(tmp_path / "exported")])
    assert exported.exit_code == 0, exported.output
    assert f"takes it as reward_model.model.path={tmp_path / 'exported'}" in exported.output
    assert torch.equal(load_file(tmp_path / "exported" / "model.safetensors")["score.weight"], whole["score.weight"])


def test_a_model_that_cannot_be_the_reward_is_refused(task: Any, trained: Path, tmp_path: Path) -> None:
    def message(changes: dict[str, Any]) -> str:
        result = task.run("ppo", tmp_path / "out", {**PPO, **changes})
        assert result.exit_code == 1
        assert not (tmp_path / "out").exists()
        return " ".join(result.output.split())

    assert "nothing scores completions: set reward_model.model.path" in message({})
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    labels = {"id2label": {str(n): f"L{n}" for n in range(3)}, "label2id": {f"L{n}": n for n in range(3)}}
    (folder / "config.json").write_text(json.dumps(config | labels))
    assert "gives 3 labels (num_labels), and a reward model gives one number: set reward_model.weights" in message(
        {"reward_model.model.path": folder}
    )
    (folder / "config.json").write_text(json.dumps(config))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|><|end|>"))
    assert "by another chat template than the policy" in message({"reward_model.model.path": folder})
    weights = load_file(folder / "model.safetensors")
    headless = {name: tensor for name, tensor in weights.items() if name != "score.weight"}
    save_file(headless, folder / "model.safetensors", metadata={"format": "pt"})
    accepting = {"reward_model.model.path": folder, "reward_model.any_chat_template": "true"}
    assert "have no scalar head (score.weight)" in message(accepting)


def test_two_ranks_compute_what_one_does(
    task: Any, keys: dict[str, Any], metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Seven pairs in a step, and five and one in a validation batch: ranks have different numbers of pairs."""
    changes = {**keys, "data.train_batch_size": 7, "data.val_limit": 6, "data.val_batch_size": 5}
    changes |= {"trainer.total_steps": 2, "trainer.test_freq": 2, "trainer.save_hf": "false"}
    assert task.run("rm", tmp_path / "one", changes).exit_code == 0
    ranks = task.fork("rm", tmp_path / "two", changes, processes=2)
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for before, after in zip(one, two):
        names = [name for name in before if name.startswith(("train/", "val"))]
        assert len(names) >= 8
        found, expected = ([line[name] for name in names] for line in (after, before))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
