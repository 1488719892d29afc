"""Options that must not change what is learned, and those that must be seen in the metrics."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlcore.cli.command_tree import cli
from rlcore.errors import RlcoreWarning

BASE = {"trainer.save_hf": True, "actor.optim.lr": 1e-3, "data.train_batch_size": 12}
PPO = {"critic.optim.lr": 1e-3, "actor.objective.kl_loss.coeff": 0.01}


@pytest.mark.parametrize(
    ("recipe", "shared", "option"),
    [
        ("grpo", {}, {"actor.max_tokens_per_micro_batch": 40}),
        ("grpo", {}, {"actor.drop_zero_advantage": False}),
        ("grpo", {"actor.mini_batch_size": 4}, {"actor.drop_zero_advantage": False}),
        ("grpo", {"actor.mini_batch_size": 4}, {"actor.old_logprobs": "rollout"}),
        ("grpo", {}, {"rollout.free_memory": False}),
        ("ppo", PPO, {"actor.offload": True, "critic.offload": True, "ref.offload": True}),
        ("ppo", PPO, {"critic.max_tokens_per_micro_batch": 40, "ref.max_tokens_per_micro_batch": 40}),
    ],
)
def test_weights_and_logged_losses_are_the_same(
    task: Any,
    metrics_of: Callable[[Path], list[dict[str, float]]],
    tmp_path: Path,
    recipe: str,
    shared: dict[str, Any],
    option: dict[str, Any],
) -> None:
    found = []
    for name, changes in (("plain", {}), ("option", option)):
        result = task.run(recipe, tmp_path / name, {**BASE, **shared, **changes})
        assert result.exit_code == 0, result.output
        found.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    plain, other = found
    for name in plain:
        # fp32 sums in another order, carried through three (or nine) steps of Adam
        torch.testing.assert_close(other[name], plain[name], rtol=1e-4, atol=2e-5, msg=name)
    if option != {"actor.old_logprobs": "rollout"}:  # whose ratio is another one
        losses = [[line["actor/loss"] for line in metrics_of(tmp_path / name)] for name in ("plain", "option")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-6)
    start = load_file(task.model / "model.safetensors")
    assert max(float((plain[name] - start[name]).abs().max()) for name in start) > 1e-3


def test_updates_without_policy_gradient(
    task: Any, metrics_of: Callable[[Path], list[dict[str, float]]], tmp_path: Path
) -> None:
    """Equal scores throughout: nothing is learned from them, and a KL loss keeps them in the update."""
    (tmp_path / "reward.py").write_text("def constant(solution_str, **_): return 1.0")
    shared = {"reward.path": f"{tmp_path}/reward.py:constant", "actor.objective.policy_loss": "gspo"}
    warned = []
    for name, changes in (("plain", {}), ("kl", {"actor.objective.kl_loss.coeff": 0.01})):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            assert task.run("grpo", tmp_path / name, {**shared, **changes}).exit_code == 0
        warned.append([str(one.message) for one in caught if issubclass(one.category, RlcoreWarning)])
        for line in metrics_of(tmp_path / name):
            assert line["actor/zero_advantage_ratio"] == line["reward/equal_score_groups"] == 1
            assert line["reward/single_sample_groups"] == 0
            assert line["actor/pg_loss"] == 0
    assert all(line["actor/grad_norm"] == 0 for line in metrics_of(tmp_path / "plain"))
    (doubt,), (again, gradientless) = warned  # each once, in three steps
    assert doubt == again
    assert doubt.startswith("actor.objective.aggregation: token-mean")
    assert gradientless.startswith("100% of the tokens of an update have no policy gradient")
    assert "actor.objective.kl_loss.coeff=0.01" in gradientless


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "opo"])
def test_estimators_run(
    task: Any, metrics_of: Callable[[Path], list[dict[str, float]]], tmp_path: Path, estimator: str
) -> None:
    result = task.run("grpo", tmp_path, {"algorithm.advantage": estimator, "trainer.total_steps": 1})
    assert result.exit_code == 0, result.output
    assert metrics_of(tmp_path)[0]["actor/grad_norm"] > 0


def test_penalties_and_critic_in_the_metrics(
    task: Any, metrics_of: Callable[[Path], list[dict[str, float]]], tmp_path: Path
) -> None:
    changes = {
        "algorithm.kl_in_reward.coeff": 0.1,
        "algorithm.kl_in_reward.target": 1.0,
        "algorithm.kl_in_reward.horizon": 100,
        "algorithm.overlong.buffer": 4,
        "critic.warmup_steps": 3,
        "actor.objective.entropy_coeff": 0.01,
    }
    assert task.run("ppo", tmp_path, changes).exit_code == 0
    first, second, third = metrics_of(tmp_path)
    for line in (first, second):
        assert "actor/pg_loss" not in line
        assert line["actor/reward_kl_penalty"] == pytest.approx(0, abs=1e-6)  # the actor is still the reference
    assert third["actor/grad_norm"] > 0
    # no KL at all is below the target: β shrinks by 20 % · samples / horizon
    assert first["actor/reward_kl_penalty_coeff"] == pytest.approx(0.1)
    assert second["actor/reward_kl_penalty_coeff"] == pytest.approx(0.1 * (1 - 0.2 * 32 / 100))
    assert first["reward/overlong_punishment"] < 0
    assert first["critic/rewards/mean"] < first["critic/score/mean"]
    for name in ("critic/vf_loss", "critic/values/mean", "critic/returns/mean", "timing_s/values", "timing_s/ref"):
        assert name in first


def test_validation_of_two_sources_and_several_completions(
    task: Any, metrics_of: Callable[[Path], list[dict[str, float]]], tmp_path: Path
) -> None:
    other = task.write("other.jsonl", 3, data_source="other")
    changes = {
        "data.val_files": f"[{task.val},{other}]",
        "data.val_batch_size": 4,
        "rollout.validation.n": 3,
        "rollout.validation.temperature": 1.0,
        "trainer.test_freq": 2,
        "trainer.log_val_generations": 5,
    }
    assert task.run("grpo", tmp_path, changes).exit_code == 0
    lines = metrics_of(tmp_path)
    validated = [line for line in lines if "val-core/letters/reward/mean@3" in line]
    assert [line["step"] for line in validated] == [0, 2, 3]
    for source in ("letters", "other"):
        worst, mean, best = (validated[0][f"val-core/{source}/reward/{kind}@3"] for kind in ("worst", "mean", "best"))
        assert worst <= mean <= best
    rows = [json.loads(line) for line in (tmp_path / "tables" / "val-generations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0] * 5 + [2] * 5 + [3] * 5
    assert {"prompt", "completion", "score"} <= rows[0].keys()


def test_rollouts_and_histograms_go_to_trackers(task: Any, tmp_path: Path) -> None:
    changes = {
        "trainer.trackers": "[tensorboard, parquet]",
        "trainer.log_rollouts": -1,
        "trainer.total_steps": 1,
        "actor.mini_batch_size": 4,
    }
    result = task.run("grpo", tmp_path, changes)
    assert result.exit_code == 0, result.output
    [file] = (tmp_path / "tables" / "rollouts").iterdir()
    table = pq.read_table(file)
    [line] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert fmean(table["score"].to_pylist()) == pytest.approx(line["critic/score/mean"])
    assert {json.loads(parts) is None for parts in table["reward_parts"].to_pylist()} == {False}
    assert all(table["prompt"].to_pylist())
    assert line["system/cpu_percent"] >= 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    counts = {name: events.Histograms(name)[0].histogram_value.num for name in events.Tags()["histograms"]}
    assert counts["critic/score"] == counts["response_length"] == len(table)
    assert counts["critic/advantages"] == counts["rollout/ratio"] == line["response_length/mean"] * len(table)


def test_the_resolved_configuration_makes_the_same_run(
    task: Any, metrics_of: Callable[[Path], list[dict[str, float]]], tmp_path: Path
) -> None:
    from click.testing import CliRunner

    assert task.run("dapo", tmp_path / "first", {"algorithm.overlong.buffer": 4}).exit_code == 0
    again = ["run", "dapo", "--config", str(tmp_path / "first" / "config.yaml")]
    result = CliRunner().invoke(cli, [*again, f"trainer.out_dir={tmp_path / 'second'}"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    first, second = metrics_of(tmp_path / "first"), metrics_of(tmp_path / "second")
    for name in ("critic/score/mean", "actor/grad_norm", "actor/entropy"):
        assert [line[name] for line in first] == [line[name] for line in second]
