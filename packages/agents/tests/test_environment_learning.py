"""A policy learns from episodes: to call a calculator, and to read hints in a game (short runs of the examples)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlcore.cli.command_tree import cli
from rlcore.object_path import load_object

EXAMPLES = Path(__file__).parents[3] / "examples" / "agents"


def rlcore(
    recipe: str, folder: Path, out: str, keys: Mapping[str, Any], config: str | None = None
) -> list[dict[str, Any]]:
    """Run a recipe with a configuration of the examples in this process; return its metrics, step by step."""
    keys = {**keys, "trainer.trackers": "[jsonl]", "trainer.out_dir": folder / out}
    file = str(EXAMPLES / f"{config or recipe}.yaml")
    arguments = ["run", recipe, "--config", file, *(f"{key}={value}" for key, value in keys.items())]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_policy_learns_to_call_a_calculator(tmp_path: Path) -> None:
    """It cannot compute products: accuracy rises with the share of episodes that call the tool."""
    load_object(str(EXAMPLES / "calculator.py"), "main")(tmp_path)
    sft = {"model.path": tmp_path / "model", "data.train_files": tmp_path / "sft.jsonl"}
    rlcore("sft", tmp_path, "sft", sft)
    keys = {
        "model.path": tmp_path / "sft" / "model",
        "data.train_files": tmp_path / "train.jsonl",
        "data.val_files": tmp_path / "test.jsonl",
        "rollout.environment": f"{EXAMPLES / 'calculator.py'}:Calculator",
        "trainer.total_steps": 10,
    }
    steps = rlcore("grpo", tmp_path, "grpo", keys)
    before, after = steps[0], steps[-1]
    assert before["val-aux/rollout/tool_calls"] < 0.55
    assert after["val-aux/rollout/tool_calls"] > before["val-aux/rollout/tool_calls"] + 0.2
    assert after["val-core/products/reward/mean@1"] > before["val-core/products/reward/mean@1"] + 0.2
    assert after["val-core/products/reward/mean@1"] > 0.5


@pytest.mark.slow
def test_a_policy_learns_a_game_of_two_turns(tmp_path: Path) -> None:
    """It begins with the middle number and guesses on at random; two of three games can be won without the hint."""
    load_object(str(EXAMPLES / "guess.py"), "main")(tmp_path, "2")
    sft = {"model.path": tmp_path / "model", "data.train_files": tmp_path / "sft.jsonl", "data.max_length": 64}
    rlcore("sft", tmp_path, "sft", {**sft, "trainer.total_steps": 60})
    keys = {
        "model.path": tmp_path / "sft" / "model",
        "data.train_files": tmp_path / "train.jsonl",
        "rollout.environment.path": f"{EXAMPLES / 'guess.py'}:Guess",
        "trainer.total_steps": 60,
        "trainer.save_hf": "false",
    }
    won = [step["rollout/env/won"] for step in rlcore("grpo", tmp_path, "grpo", keys, "guess")]
    assert sum(won[:5]) / 5 < 0.7
    assert sum(won[-5:]) / 5 > 0.8, won
