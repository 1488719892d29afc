"""Runs whose rollouts are episodes of several turns (``rollout.environment``)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlcore import plugins
from rlcore.config import load_config
from rlcore.errors import ConfigError
from rlcore_recipes.settings.environment import EnvironmentRole

Metrics = Callable[[Path], list[dict[str, float]]]
EPISODES = {
    "rollout.environment": "scripted",
    "reward.path": None,
    "reward.workers": None,
    "data.max_response_length": 16,
    "trainer.total_steps": 1,
}


def test_a_run_without_a_reward_learns_from_the_scores_of_its_episodes(
    task: Any, metrics_of: Metrics, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    keys = {"trainer.test_freq": 1, "trainer.val_before_train": False, "rollout.environment.scripted.log": log}
    result = task.run("grpo", tmp_path / "run", EPISODES | keys)
    assert result.exit_code == 0, result.output
    (metrics,) = metrics_of(tmp_path / "run")
    assert metrics["critic/score/mean"] >= 0
    assert 0 <= metrics["val-core/letters/reward/mean@1"] <= 1
    lines = log.read_text().splitlines()
    assert sum(line.startswith("begin train") for line in lines) == 8 * 4
    assert sum(line.startswith("begin validation") for line in lines) == 6
    assert lines[-2:] == ["close train", "close validation"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mistake": "raises"}, "the environment 'scripted' failed in the episode .*: ValueError: no such move"),
        ({"mistake": "no trajectory"}, "it returned a str, not a Trajectory"),
        ({"mistake": "too long"}, "its trajectory has a row of 3.. tokens, and 48 are allowed"),
        ({"mistake": "cannot be built"}, "the environment 'scripted' cannot be opened: ValueError: no such game"),
    ],
)
def test_a_mistake_of_a_runner_ends_the_run_with_a_sentence(
    keys: dict[str, Any], message: str, task: Any, tmp_path: Path
) -> None:
    result = task.run("grpo", tmp_path, EPISODES | {"rollout.environment.scripted": keys})
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert re.search(message, " ".join(result.output.split())), result.output


@pytest.mark.parametrize(
    ("recipe", "keys", "message"),
    [
        ("self_play", {}, "rollout.environment: cannot be set: this recipe has another kind of episode"),
        ("grpo", {"algorithm.advantage": "remax"}, "rollout.environment: has no greedy baseline, with which remax"),
        ("spin", {}, r"completions of the data set \(response\)"),
        (
            "grpo",
            {"rollout.environment.turn_tokens": 17},
            "turn_tokens: 17 does not fit into data.max_response_length=16",
        ),
        ("grpo", {"rollout.environment.turns": 3}, "rollout.environment.turns: unknown key"),
        ("grpo", {"rollout.environment": "scriptd"}, "unknown environment 'scriptd'; did you mean 'scripted'"),
        ("grpo", {"rollout.environment": None, "reward.name": "environment"}, "reward.name: is environment, and there"),
    ],
)
def test_what_cannot_work_is_refused(
    recipe: str, keys: dict[str, Any], message: str, task: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(task, recipe, tmp_path, EPISODES | keys)


def test_a_text_is_the_name_of_an_environment_or_the_path_of_one(task: Any, tmp_path: Path) -> None:
    config = load(task, "grpo", tmp_path, EPISODES | {"rollout.environment.scripted.turns": 3})
    role = config.rollout.environment
    assert (role.name, role.options.turns, config.reward.name) == ("scripted", 3, "environment")
    assert EnvironmentRole.from_text("my_env.py:MyEnv") == {"path": "my_env.py:MyEnv"}
    assert EnvironmentRole.spelled_out({"path": "a.py:B"}) == {"name": "python", "python": {"path": "a.py:B"}}
    short, section = {"command": "python a.py"}, {"name": "command", "command": {"command": "python a.py"}}
    assert EnvironmentRole.spelled_out(short) == section
    assert EnvironmentRole.spelled_out(section) == section


def load(task: Any, recipe: str, out_dir: Path, keys: dict[str, Any]) -> Any:
    arguments = task.arguments(recipe, out_dir, keys)[2:]
    return load_config(plugins.get("rlcore.recipes", recipe).config_class(), overrides=arguments)
