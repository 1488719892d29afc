"""PRIME: a process reward model that learns from outcomes while it rewards the policy's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from rlcore.cli.command_tree import cli

LEARN = {
    "trainer.total_steps": 18,
    "data.train_batch_size": 16,
    "rollout.n": 8,
    "actor.optim.lr": 1e-2,
    "prm.optim.lr": 1e-2,
    "prm.right_above": 0.12,  # one letter among the eight characters
    "algorithm.dynamic_sampling.filter": "nonzero-spread",
}
PROCESS_REWARDS_ALONE = {"algorithm.advantage": "{name: prime, outcome_coeff: 0.0}", "prm.update": "after"}


@pytest.mark.parametrize("changes", [{"prm.mini_batch_size": 8}, PROCESS_REWARDS_ALONE])
def test_score_rises_and_the_process_reward_model_learns(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Also from the rewards of tokens alone, in which the score is only through what the model learned of it."""
    result = task.run("prime", tmp_path, {**LEARN, **changes})
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path)
    scores = [line["critic/score/mean"] for line in lines]
    assert scores[0] < 0.2
    assert sum(scores[-3:]) / 3 > 0.6, scores
    assert lines[0]["prm/loss"] == pytest.approx(0.693, abs=1e-3)  # log-ratio 0
    assert lines[-1]["prm/loss"] < 0.5
    assert lines[-1]["prm/accuracy"] > 0.9
    assert lines[0]["prm/unlabelled"] == 0
    if changes.get("prm.update") == "after":
        assert lines[0]["prm/reward"] == 0  # to the last bit: model and reference are the same


@pytest.mark.usefixtures("cluster")
def test_a_process_reward_model_in_another_process_is_exported(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    changes = {"trainer.total_steps": 2, "trainer.save_freq": 2, "prm.optim.lr": 1e-2, "prm.offload": True}
    changes |= {"algorithm.dynamic_sampling": "null", "prm.right_above": 0.12}
    apart = {
        "controller.kind": "ray",
        "controller.pools": {"policy": {}, "judge": {}},
        "controller.placement": {"actor": "policy", "rollout": "policy", "ref": "judge", "prm": "judge"},
        "controller.call_timeout_s": 600,
    }
    found = {}
    for name, controller in (("local", {}), ("ray", apart)):
        result = task.run("prime", tmp_path / name, {**changes, **controller})
        assert result.exit_code == 0, result.output
        names = ("prm/loss", "prm/reward", "prm/pair_accuracy", "actor/pg_loss", "critic/advantages/max")
        found[name] = [line.get(key) for line in metrics_of(tmp_path / name) for key in names]
    assert found["ray"] == pytest.approx(found["local"], rel=1e-3, abs=1e-5)
    exported = tmp_path / "prm"
    arguments = ["export", str(tmp_path / "local"), "--role", "prm", "--out", str(exported)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    before, after = load_file(task.model / "model.safetensors"), load_file(exported / "model.safetensors")
    assert before.keys() == after.keys()
    assert not all(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm.advantage": "rloo"}, "rloo reads no process rewards, which prm learns: take prime"),
        ({"rollout.n": 1, "algorithm.dynamic_sampling": "null"}, "prime compares the completions of a prompt"),
        ({"prm.mini_batch_size": 5}, "is no multiple of prm.mini_batch_size=5"),
        ({"prm.beta": 0}, "prm.beta"),
        ({"prm.model.path": "nowhere/at/all"}, "prm.model.path=nowhere/at/all"),
    ],
)
def test_what_cannot_work_is_refused(task: Any, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    result = task.run("prime", tmp_path / "out", changes)
    assert result.exit_code == 1
    assert reason in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_other_recipes_say_who_makes_process_rewards(task: Any, tmp_path: Path) -> None:
    result = task.run("grpo", tmp_path / "out", {"algorithm.advantage": "prime"})
    assert result.exit_code == 1
    assert "prime needs the rewards of tokens, which the recipe prime computes" in " ".join(result.output.split())
