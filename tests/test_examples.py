"""Everything in ``examples/``: each command of its README runs, and the code does what it says."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rlcore.batch import Batch, Jagged

EXAMPLES = Path(__file__).parent.parent / "examples"
SECTIONS = {
    title: blocks.replace("\\\n", " ").splitlines()
    for title, blocks in re.findall(
        r"^#+ (.+?)\n.*?```bash\n(.+?)```", (EXAMPLES / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
}
NO_MORE: Mapping[str, str] = {}


def run(title: str, folder: Path, more: Mapping[str, str] = NO_MORE) -> str:
    """Run the commands below a heading of the README; their output."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **more,
    }
    script = "\n".join(SECTIONS[title])
    done = subprocess.run(
        ["bash", "-eux", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def last_step(folder: Path, name: str) -> dict[str, Any]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def load(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples with the model and the data that they need."""
    copy = tmp_path_factory.mktemp("checkout") / "examples"
    shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    run("Examples", copy)
    return copy


def test_every_section_has_its_test() -> None:
    assert list(SECTIONS) == [
        "Examples",
        "A reward function",
        "An advantage estimator",
        "A policy loss",
        "A recipe",
        "A reward in a package",
        "Training from Python",
        "Two processes",
        "Worker processes by Ray",
    ]


def test_custom_reward_runs(folder: Path) -> None:
    run("A reward function", folder)
    metrics = last_step(folder, "custom-reward")
    assert metrics["step"] == 2
    assert metrics["reward/error_ratio"] == 0


@pytest.mark.parametrize(
    ("completion", "score"), [("#### 42", 1.0), ("43", 0.5), ("-42 or 39", 0.25), ("forty-two", 0.0)]
)
def test_custom_reward_gives_partial_credit(completion: str, score: float) -> None:
    assert load(EXAMPLES / "custom_reward.py").compute_score(completion, "42")["score"] == score


def test_custom_advantage_runs(folder: Path) -> None:
    run("An advantage estimator", folder)
    assert last_step(folder, "rank")["step"] == 2


def test_custom_advantage_compares_within_groups() -> None:
    example = load(EXAMPLES / "custom_advantage.py")
    scores = torch.tensor([0.0, 10.0, 0.5, 7.0, 7.0, 1.0])
    lengths = torch.full((6,), 2)
    token_rewards = torch.stack([torch.zeros(6), scores], 1).flatten()
    batch = Batch(
        {
            "loss_mask": Jagged(torch.ones(12), lengths),
            "token_rewards": Jagged(token_rewards, lengths),
            "group": torch.tensor([5, 5, 5, 2, 2, 9]),
        }
    )
    for margin, expected in [(0.0, [-1, 1, 0, 0, 0, 0]), (0.5, [-0.5, 1, -0.5, 0, 0, 0])]:
        advantages = example.rank(batch, example.RankParams(margin=margin)).advantages.view(6, 2)
        # nothing predicts a sequence's first token
        assert advantages[:, 0].tolist() == [0] * 6
        assert advantages[:, 1].tolist() == expected


def test_custom_advantage_is_found_by_entry_point(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "custom_advantage.py", tmp_path)
    metadata = tmp_path / "rank-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rank\nVersion: 1\n")
    toml = re.search(r'\[project\.entry-points\."(.+)"\]\n\s*(.+)\n', (tmp_path / "custom_advantage.py").read_text())
    assert toml is not None
    (metadata / "entry_points.txt").write_text(f"[{toml[1]}]\n{toml[2].replace(chr(34), '')}\n")
    command = (sys.executable, "-m", "rlcore", "config", "validate", "grpo", f"--config={EXAMPLES / 'tiny.yaml'}")
    choice = "algorithm.advantage={name: rank, margin: -1}"
    for path, problem in [(str(tmp_path), "greater than or equal to 0"), ("", "unknown advantage estimator 'rank'")]:
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
        done = subprocess.run([*command, choice], env=environment, capture_output=True, text=True, timeout=120)
        assert problem in done.stdout + done.stderr


def test_custom_loss_runs(folder: Path) -> None:
    run("A policy loss", folder)
    assert last_step(folder, "topr")["actor/topr_capped"] >= 0


def test_custom_loss_caps_the_weight_of_negative_advantages() -> None:
    example = load(EXAMPLES / "custom_loss.py")
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    old = logprobs.detach() - torch.tensor([0.5, -0.5, 0.5, -0.5])
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0])
    inputs = example.PolicyLossInputs(logprobs, old, advantages, torch.ones(4), torch.tensor([4]))
    losses, metrics = example.topr(inputs, example.ToprParams(cap=1.25))
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-2, -2, 2 * 1.25, 2 * math.exp(-0.5)])
    assert metrics.to_dict() == {"topr_capped": 0.25}


def test_custom_recipe_runs(folder: Path) -> None:
    run("A recipe", folder)
    last = last_step(folder, "concise")
    assert last["step"] == 2
    assert -0.5 <= last["reward/length"] <= 0.5


def test_custom_recipe_rewards_short_right_answers() -> None:
    batch = Batch(
        {
            "response_length": torch.tensor([10, 20, 30, 30, 7, 7, 5]),
            "group": torch.tensor([4, 4, 4, 4, 1, 1, 8]),
            "score": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
        }
    )
    found = load(EXAMPLES / "custom_recipe.py").length_reward(batch)
    assert found.tolist() == [0.5, 0.0, -0.5, -0.5, 0.0, 0.0, 0.0]
    short_and_wrong = batch.with_columns(score=torch.zeros(7))
    assert load(EXAMPLES / "custom_recipe.py").length_reward(short_and_wrong)[0] == 0


def test_third_party_reward_is_found_scores_and_conforms(folder: Path, tmp_path: Path) -> None:
    # installed outside the environment, which stays as it is
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    site = tmp_path / "site"
    pip.write_text(f'#!/bin/sh\nexec uv pip "$1" --quiet --no-deps --target {site} --python {sys.executable} "$2"\n')
    pip.chmod(0o755)
    path = os.pathsep.join(map(str, (pip.parent, Path(sys.executable).parent, os.environ["PATH"])))
    output = run("A reward in a package", folder, {"PATH": path, "PYTHONPATH": str(site)})
    listed = next(line for line in output.splitlines() if "riddles" in line)
    assert listed.split()[:5] == ["rewards", "riddles", "rlcore-riddles", "0.1.0", "1"]
    assert "The last word is the ground truth" in listed
    assert re.search(r"\d+ passed", output)
    assert any("words" in name for name in last_step(folder, "riddles"))


def test_training_from_python(folder: Path) -> None:
    assert "the model is in runs/from-python/model" in run("Training from Python", folder)
    last = last_step(folder, "from-python")
    assert (last["step"], last["reward/error_ratio"]) == (2, 0)
    assert last["critic/score/mean"] == pytest.approx(last["reward/near/score"] + 0.1 * last["reward/short/score"])


def test_two_processes_run(folder: Path) -> None:
    run("Two processes", folder)
    assert last_step(folder, "two-processes")["step"] == 2


def test_worker_processes_by_ray(folder: Path) -> None:
    planned = run("Worker processes by Ray", folder)
    assert "train[0]" in planned
    last = last_step(folder, "ray")
    assert last["step"] == 2
    assert last["rollout/staleness_max"] <= 1
    assert last["weight_sync/sent_mb"] > 0
    assert (folder / "runs" / "ray" / "trace.json").is_file()
