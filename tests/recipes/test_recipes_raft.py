"""Rejection sampling: what is kept is imitated, saved, and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlcore import plugins
from rlcore.batch import Batch
from rlcore.config import load_config
from rlcore.engines.episode import PromptSample
from rlcore.errors import RlcoreWarning
from rlcore_recipes.rollouts.plan import training_plan
from rlcore_recipes.rollouts.synchronous import roll_out_together
from rlcore_recipes.run.open import open_session
from rlcore_recipes.step import add_rationalizations, add_scores, rollouts

LEARN = {
    "trainer.total_steps": 16,
    "data.train_batch_size": 16,
    "actor.mini_batch_size": 8,
    "actor.optim.lr": 1e-2,
    "algorithm.selection.keep_truncated": True,  # no completion of the task ends before its eight tokens
}
TOP = {"algorithm.selection.selector": "{name: top-fraction, fraction: 0.2}"}
COUNTS = ("failed", "truncated", "duplicates", "rejected", "surplus", "kept")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"actor.epochs": 2}, id="best"),
        pytest.param(TOP, id="top-fraction"),
        pytest.param({"algorithm.selection.selector": "{name: exponential, beta: 0.05}"}, id="exponential"),
        pytest.param({**TOP, "actor.objective.policy_loss": "ppo"}, id="raft++"),
        pytest.param({**TOP, "algorithm.restart": True, "actor.epochs": 10, "trainer.total_steps": 8}, id="restart"),
    ],
)
def test_score_rises(task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    result = task.run("raft", tmp_path, {**LEARN, **changes})
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path)
    scores = [line["critic/score/mean"] for line in lines]
    assert scores[0] < 0.2
    assert sum(scores[-3:]) / 3 > 0.7, scores
    for line in lines:
        assert sum(line[f"selection/{name}"] for name in COUNTS) == line["selection/samples"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_kept_is_saved_and_sft_reads_it(task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path) -> None:
    """The files hold what a loop over the logged rollouts selects; `rlcore run sft` trains on them as they are."""
    out_dir = tmp_path / "raft"
    changes = {
        "data.max_response_length": 64,  # by chance, some completions end before
        "rollout.n": 8,
        "trainer.total_steps": 2,
        "trainer.log_rollouts": -1,
        "algorithm.selection.max_per_prompt": 2,
        "algorithm.selection.selector": "{name: threshold, min_score: 0.1}",
    }
    result = task.run("raft", out_dir, changes)
    assert result.exit_code == 0, result.output
    table = rows_of(out_dir / "tables" / "rollouts.jsonl")
    files = sorted((out_dir / "selected").iterdir())
    assert [file.name for file in files] == ["step-000001.parquet", "step-000002.parquet"]
    for step, file in enumerate(files, 1):
        chosen: dict[int, list[Any]] = {}
        for row in sorted((row for row in table if row["step"] == step), key=lambda row: -row["score"]):
            mates = chosen.setdefault(row["group"], [])
            good = row["finish_reason"] == "stop" and row["score"] >= 0.1
            if good and row["completion"].strip() not in [mate["completion"].strip() for mate in mates]:
                mates.append(row)
        expected = [row for mates in chosen.values() for row in mates[:2]]
        saved = pq.read_table(file).to_pylist()
        line = metrics_of(out_dir)[step - 1]
        assert len(saved) == len(expected) == line["selection/kept"] - line["selection/unsaved"] > 0
        assert sorted(row["score"] for row in saved) == sorted(row["score"] for row in expected)
        for row in saved:
            assert row["prompt"][0]["content"].startswith("say ")
            assert row["sample_weight"] == 1
    listed = ",".join(map(str, files))
    keys = dict.fromkeys(("data.max_response_length", "data.max_prompt_length", "rollout.n", "reward.path"))
    sft = {
        **keys,
        "reward.workers": None,
        "data.train_files": f"[{listed}]",
        "data.train_batch_size": 4,
        "trainer.total_steps": 6,
        "actor.optim.lr": 1e-2,
    }
    result = task.run("sft", tmp_path / "sft", sft)
    assert result.exit_code == 0, result.output
    losses = [line["train/loss"] for line in metrics_of(tmp_path / "sft")]
    assert losses[-1] < losses[0]


def test_hints_are_in_the_sampled_prompt_and_not_in_the_trained_one(task: Any, tmp_path: Path) -> None:
    changes = {"algorithm.rationalization.hint": " ({ground_truth})", "algorithm.rationalization.n": 2}
    changes |= {"data.max_prompt_length": 24, "algorithm.selection.keep_truncated": True}
    arguments = task.arguments("raft", tmp_path / "out", changes)[2:]
    config = load_config(plugins.get("rlcore.recipes", "raft").config_class(), None, arguments)
    with open_session(config) as session:
        samples = rollouts(session, 1)
        batch = add_scores(session, samples.batch, samples)
        groups = batch["group"]
        kept = groups < 5  # the last three prompts have nothing
        batch, metrics = add_rationalizations(session, batch.with_columns(sample_weight=kept.float()))
        assert metrics.to_dict()["rationalization/prompts"] == 3
        assert "rollout_logprobs" not in batch
        added = batch.slice(32, len(batch))
        assert added["group"].tolist() == [5, 5, 6, 6, 7, 7]
        assert [float(weight) for weight in added["sample_weight"]] != [0.0] * 6
        originals = {int(group): tokens for group, tokens in zip(groups, batch["tokens"].to_list())}
        hinted = []
        for row in range(0, 6, 2):
            prompt, length = originals[int(added["group"][row])], int(added["prompt_length"][row])
            assert added["tokens"].to_list()[row][:length].tolist() == prompt[:length].tolist()
            (message,) = added["messages"][row]
            content = f"{message['content']} ({added['ground_truth'][row]})"
            text = session.tokenizer.apply_chat_template(
                [{**message, "content": content}], tokenize=False, add_generation_prompt=True
            )
            tokens = session.tokenizer(text, add_special_tokens=False)["input_ids"]
            hinted.append(PromptSample(tokens, [message], position=int(added["group"][row])))
        plan = replace(training_plan(config, session.stop_tokens), purpose="rationalization", n=2)
        expected = roll_out_together(session.workers, plan, hinted).batch
        assert completions(added) == completions(expected)
        mask = added["loss_mask"].to_list()
        for row, length in enumerate(added["prompt_length"].tolist()):
            assert not mask[row][:length].any()
            assert mask[row][length:].all()


def completions(batch: Batch) -> list[list[int]]:
    lengths = batch["prompt_length"].tolist()
    return [tokens[length:].tolist() for tokens, length in zip(batch["tokens"].to_list(), lengths)]


HINTED = {
    "algorithm.selection.keep_truncated": True,
    "algorithm.selection.selector": "{name: threshold, min_score: 0.3}",
    "algorithm.rationalization.hint": " ({ground_truth})",
    "actor.mini_batch_size": 4,
    "trainer.total_steps": 2,
}


@pytest.mark.usefixtures("cluster")
def test_a_driver_of_ray_workers_does_the_same(task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path) -> None:
    ray = {"controller.kind": "ray", "controller.call_timeout_s": 600, "controller.pools": {"all": {}}}
    found, saved = [], []
    for name, controller in (("local", {}), ("ray", ray)):
        result = task.run("raft", tmp_path / name, {**HINTED, **controller})
        assert result.exit_code == 0, result.output
        lines = metrics_of(tmp_path / name)
        assert lines[0]["rationalization/prompts"] > 0
        names = [name for name in lines[0] if name.split("/")[0] in ("selection", "rationalization", "actor", "critic")]
        found.append([{name: line[name] for name in names} for line in lines])
        saved.append([path.name for path in sorted((tmp_path / name / "selected").iterdir())])
    assert saved[0] == saved[1]
    for expected, line in zip(*found):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_hints_that_make_a_prompt_too_long_are_counted_and_said(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    with pytest.warns(RlcoreWarning, match="8 of 8 prompts are with their hint longer than data.max_prompt_length=32"):
        result = task.run("raft", tmp_path, {**HINTED, "algorithm.rationalization.hint": "{ground_truth}" * 40})
    assert result.exit_code == 0, result.output
    assert metrics_of(tmp_path)[0]["rationalization/too_long"] == 8


def test_a_round_in_which_nothing_is_kept_trains_nothing(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    changes = {"algorithm.selection.selector": "{name: threshold, min_score: 2}", "trainer.total_steps": 1}
    result = task.run("raft", tmp_path, changes)
    assert result.exit_code == 0, result.output
    (line,) = metrics_of(tmp_path)
    assert line["selection/kept"] == line["selection/prompts_kept"] == 0
    assert "actor/grad_norm" not in line
    assert not list((tmp_path / "selected").iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rollout.n": 1}, "keeps the best 1 of rollout.n=1 completions, which is all of them"),
        ({"algorithm.kl_in_reward.coeff": 0.1}, "algorithm.kl_in_reward: changes nothing, as sample_weight gives no"),
        (
            {"algorithm.restart": True, "actor.objective.policy_loss": "ppo"},
            "with which actor.objective.policy_loss=ppo compares it",
        ),
        (
            {"algorithm.rationalization": "{}", "actor.old_logprobs": "rollout"},
            "trains on a prompt without the hint that the sampler had",
        ),
        ({"algorithm.rationalization": "{}", "data.ground_truth_key": "null"}, "data.ground_truth_key is null"),
        ({"algorithm.rationalization.hint": "'the answer'"}, "must contain {ground_truth} and no other field"),
        ({"algorithm.rationalization.hint": "'{ground_truth} {'"}, "is not a format string"),
        ({"algorithm.selection.selector": "bestt"}, "unknown sample selector 'bestt'; did you mean 'best'?"),
        ({"algorithm.selection.selector": "{name: best, k: 0}"}, "algorithm.selection.selector"),
    ],
)
def test_what_cannot_work_is_refused(task: Any, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    result = task.run("raft", tmp_path / "out", changes)
    assert result.exit_code == 1
    assert reason in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_restart_needs_the_first_weights(task: Any, tmp_path: Path) -> None:
    changes = {"algorithm.restart": True, "trainer.total_steps": 1, "trainer.save_freq": 1}
    assert task.run("raft", tmp_path, changes).exit_code == 0
    (tmp_path / "first-weights").rename(tmp_path / "elsewhere")
    result = task.run("raft", tmp_path, {**changes, "trainer.total_steps": 2})
    assert result.exit_code == 1
    assert "first-weights is not there: the first step wrote the weights there" in " ".join(result.output.split())
