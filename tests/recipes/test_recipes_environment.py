"""Runs whose rollouts are episodes of several turns (``rollout.environment``)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from rlcore import plugins
from rlcore.cli.command_tree import cli
from rlcore.config import load_config
from rlcore.errors import ConfigError, RlcoreWarning
from rlcore_recipes.rollouts import environment
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
    keys = {
        "trainer.test_freq": 1,
        "trainer.val_before_train": False,
        "trainer.log_rollouts": -1,
        "trainer.log_val_generations": 2,
        "rollout.environment.scripted": {"log": str(log), "turn_rewards": True},
    }
    result = task.run("grpo", tmp_path / "run", EPISODES | keys)
    assert result.exit_code == 0, result.output
    (metrics,) = metrics_of(tmp_path / "run")
    assert 0 < metrics["critic/score/mean"] < 3
    assert metrics["critic/score/max"] > 1, "the rewards of two turns are added to the score of the episode"
    assert 0 <= metrics["val-core/letters/reward/mean@1"] <= 3
    for prefix in ("", "val-aux/"):
        assert metrics[f"{prefix}rollout/turns"] == 2
        assert metrics[f"{prefix}rollout/tool_calls"] == 1
        assert metrics[f"{prefix}rollout/invalid_episodes"] == 0
    tables = tmp_path / "run" / "tables"
    rows = [json.loads(line) for line in (tables / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 4
    roles = [message["role"] for message in json.loads(rows[0]["transcript"])]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert rows[0]["invalid"] == ""
    (generations,) = tables.glob("*generations*.jsonl")
    assert "transcript" in json.loads(generations.read_text().splitlines()[0])
    lines = log.read_text().splitlines()
    assert sum(line.startswith("begin train") for line in lines) == 8 * 4
    assert sum(line.startswith("begin validation") for line in lines) == 6
    assert lines[0] == "close train", "it was opened once before the models were built"
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


INVALID = list(range(48))  # positions of all prompts of the first epoch


def test_an_invalid_episode_is_run_again_with_another_seed(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    keys = {"rollout.environment.scripted": {"invalid": [3], "invalid_once": True, "log": str(tmp_path / "log")}}
    result = task.run("grpo", tmp_path / "run", EPISODES | keys)
    assert result.exit_code == 0, result.output
    (metrics,) = metrics_of(tmp_path / "run")
    assert metrics["rollout/retries"] == 1 / 32
    assert metrics["rollout/invalid_episodes"] == 0
    seeds = [
        line.split()[3] for line in (tmp_path / "log").read_text().splitlines() if line.startswith("begin train 3 ")
    ]
    assert len(set(seeds)) == 5


@pytest.mark.filterwarnings("ignore:.*of the episodes of a step are invalid:rlcore.errors.RlcoreWarning")
def test_what_is_learned_of_valid_episodes_does_not_depend_on_invalid_ones(
    task: Any, metrics_of: Metrics, tmp_path: Path
) -> None:
    keys = EPISODES | {"rollout.environment.scripted": {"invalid": [3, 5]}, "rollout.environment.retries": 0}
    with pytest.warns(
        RlcoreWarning, match="25% of the episodes of a step are invalid, the first one because the game is b"
    ):
        assert task.run("grpo", tmp_path / "out", keys | {"trainer.log_rollouts": -1}).exit_code == 0
    assert task.run("grpo", tmp_path / "scored", keys | {"rollout.environment.error_score": -7}).exit_code == 0
    (out,), (scored,) = metrics_of(tmp_path / "out"), metrics_of(tmp_path / "scored")
    assert out["rollout/invalid_episodes"] == scored["rollout/invalid_episodes"] == 8
    assert out["critic/score/min"] >= 0
    assert scored["critic/score/min"] == -7
    assert scored["critic/score/mean"] == pytest.approx(0.75 * out["critic/score/mean"] - 0.25 * 7)
    assert out["reward/error_ratio"] == scored["reward/error_ratio"] == 0
    rows = [json.loads(line) for line in (tmp_path / "out/tables/rollouts.jsonl").read_text().splitlines()]
    assert {row["group"] for row in rows if row["invalid"]} == {3, 5}


@pytest.mark.filterwarnings("ignore:.*of the episodes of a step are invalid:rlcore.errors.RlcoreWarning")
def test_a_broken_environment_ends_the_run_with_its_reason(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    keys = {"rollout.environment.scripted": {"invalid": INVALID}, "rollout.environment.retries": 0}
    keys |= {"trainer.total_steps": 2, "trainer.test_freq": 1}
    result = task.run("grpo", tmp_path, EPISODES | keys)
    assert result.exit_code == 1
    message = (
        "100% of the episodes of the last 2 steps were invalid, more than rollout.environment.max_invalid_ratio=0.9"
    )
    assert f"{message} (64 times: the game is broken)" in " ".join(result.output.split())
    assert metrics_of(tmp_path)[-1]["val-aux/rollout/invalid_ratio"] == 1


def test_a_reward_function_reads_the_conversation(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def score(solution_str, transcript):\n    return float([m['role'] for m in transcript].count('tool'))\n"
    )
    keys = {"reward.path": f"{reward}:score", "rollout.environment.scripted.turns": 3}
    result = task.run("grpo", tmp_path / "run", EPISODES | keys)
    assert result.exit_code == 0, result.output
    assert metrics_of(tmp_path / "run")[0]["critic/score/mean"] == 2


# --- resume, asynchronous training, workers that die ------------------------------------------------------------------

APART = {
    "controller.kind": "ray",
    "controller.pools": {"train": {"cpus_per_process": 0.5}, "gen": {"processes": 2, "cpus_per_process": 0.5}},
    "controller.placement": {"actor": "train", "rollout": "gen", "reward": "gen", "compute": "gen"},
    "controller.call_timeout_s": 200,
    "actor.fsdp.device": "cpu",
    "rollout.inline.device": "cpu",
    "actor.objective.correction": "tis",
}


def test_a_resumed_run_is_the_same_to_the_bit(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    keys = EPISODES | {
        "trainer.total_steps": 3,
        "trainer.save_freq": 1,
        "actor.optim.lr": 1e-2,
        "trainer.save_hf": True,
    }
    keys["rollout.environment.scripted"] = {"invalid": [3, 9], "invalid_once": True, "turn_rewards": True}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder, steps in ((whole, 3), (halves, 2), (halves, 3)):
        result = task.run("grpo", folder, keys | {"trainer.total_steps": steps, "actor.optim.total_steps": 3})
        assert result.exit_code == 0, result.output
    assert "continuing after step 2" in result.output
    for before, after in zip(metrics_of(whole), metrics_of(halves), strict=True):
        assert before["critic/score/mean"] == after["critic/score/mean"]
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, halves))
    assert all(expected[name].equal(found[name]) for name in expected)


def test_ranks_share_the_episodes_of_a_step(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    log = tmp_path / "log"
    keys = EPISODES | {"rollout.environment.scripted": {"log": str(log), "invalid": [3]}, "actor.fsdp.device": "cpu"}
    ranks = task.fork("grpo", tmp_path / "run", keys, processes=2)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    (metrics,) = metrics_of(tmp_path / "run")
    assert metrics["rollout/invalid_episodes"] == 4
    lines = log.read_text().splitlines()
    assert sum(line.startswith("end train") for line in lines) == 8 * 4 + 4, "four invalid ones were run again"
    assert lines.count("close train") == 4, "each rank opens the environment before models are built, and for the run"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore:.*it is replaced:rlcore.errors.RlcoreWarning")
def test_asynchronous_episodes_outlive_a_rollout_process(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    log = tmp_path / "log"
    keys = EPISODES | APART | {"async.max_staleness": 1, "trainer.total_steps": 4, "trainer.log_rollouts": -1}
    keys |= {"trainer.test_freq": 2}  # groups are in flight while it validates
    keys["rollout.environment.scripted"] = {"log": str(log), "kills_at": 10}
    result = task.run("grpo", tmp_path / "run", keys)
    assert result.exit_code == 0, result.output
    lines = [line for line in metrics_of(tmp_path / "run") if line["step"]]
    assert all(line["rollout/staleness_max"] <= 1 for line in lines)
    assert all(line["rollout/turns"] == 2 for line in lines)
    assert lines[-1]["val-aux/rollout/turns"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run/tables/rollouts.jsonl").read_text().splitlines()]
    trained = Counter(row["group"] for row in rows)
    assert trained == dict.fromkeys(range(4 * 8), 4), "every episode of every prompt is trained on once"
    events = Counter(tuple(line.split()[::2]) for line in log.read_text().splitlines())
    assert log.with_suffix(".killed").exists()
    assert events["begin", "10"] > events["end", "10"] >= 4, "the episodes of the process that died are run again"
    assert "close" in log.read_text()


# --- other recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*of the episodes of a step are invalid:rlcore.errors.RlcoreWarning")
@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("ppo", {}),
        ("dapo", {"algorithm.overlong": "null"}),
        ("raft", {}),
        ("online_dpo", {}),
        ("prime", {"algorithm.dynamic_sampling": None}),
    ],
)
def test_every_recipe_that_samples_trains_on_episodes(
    recipe: str, keys: dict[str, Any], task: Any, metrics_of: Metrics, tmp_path: Path
) -> None:
    keys = EPISODES | {"rollout.environment.scripted": {"invalid": [3], "turn_rewards": True}} | keys
    result = task.run(recipe, tmp_path, keys)
    assert result.exit_code == 0, result.output
    (metrics,) = metrics_of(tmp_path)
    assert metrics["rollout/turns"] == 2
    if recipe != "dapo":  # whose groups without valid episodes are replaced
        assert metrics["rollout/invalid_episodes"] == 4


def test_an_episode_that_outlasts_its_time_is_invalid(
    task: Any, metrics_of: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "GRACE_S", 0.1)
    keys = {"rollout.environment.timeout_s": 0.1, "rollout.environment.retries": 0}
    keys |= {"rollout.environment.scripted.mistake": "hangs"}
    result = task.run("grpo", tmp_path, EPISODES | keys)
    assert result.exit_code == 1
    assert "32 times: it did not end within rollout.environment.timeout_s=0.1" in " ".join(result.output.split())


def test_a_run_is_evaluated_in_its_environment(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    keys = {"trainer.save_freq": 1, "trainer.test_freq": 1, "rollout.environment.scripted.turn_rewards": True}
    assert task.run("grpo", tmp_path / "run", EPISODES | keys).exit_code == 0
    arguments = ["eval", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (model,) = json.loads((tmp_path / "out/results.json").read_text())["models"]
    validated = metrics_of(tmp_path / "run")[-1]["val-core/letters/reward/mean@1"]
    assert model["estimates"]["letters"]["mean@1"]["value"] == pytest.approx(validated, abs=1e-6)
    with pytest.warns(RlcoreWarning, match=r"the run's rollout.environment takes no part"):
        assert CliRunner().invoke(cli, ["generate", str(tmp_path / "run"), "--prompt", "say 1"]).exit_code == 0
