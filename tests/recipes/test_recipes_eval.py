"""`rlcore eval`: models and checkpoints on prompts, resumable and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlcore.cli.command_tree import cli
from rlcore_kit.testing.tiny_model import tiny_model

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    '''Passes where most characters are lower-case letters; the answer is the first one.'''
    share = sum(c.isascii() and c.islower() for c in solution_str) / 8
    return {"score": float(share >= 0.25), "answer": solution_str[:1], "share": share}
"""


@pytest.fixture(scope="module")
def run(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that validates with four completions of each prompt, from two data sources."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "reward.py").write_text(REWARD)
    rows = [json.loads(line) for line in Path(task.val).read_text().splitlines()]
    rows += [row | {"data_source": "more"} for row in rows[:2]]
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data.val_files": folder / "val.jsonl",
        "reward.path": f"{folder / 'reward.py'}:compute_score",
        "rollout.validation": {"n": 4, "temperature": 1.0},
        "actor.optim.lr": 1e-2,
        "trainer.total_steps": 2,
        "trainer.test_freq": 1,
        "trainer.save_freq": 1,
    }
    result = task.run("grpo", folder / "run", changes)
    assert result.exit_code == 0, result.output
    return folder / "run"


def evaluate(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def test_a_run_alone_is_evaluated_as_it_validates(
    run: Path, metrics_of: Callable[[Path], list[dict[str, float]]], tmp_path: Path
) -> None:
    printed = evaluate(run, "--out", tmp_path / "out")
    assert "run/step-000002: 8 of 8 prompts" in printed
    validated = metrics_of(run)[-1]
    (model,) = results(tmp_path / "out")["models"]
    for source in ("letters", "more"):
        for metric, name in (("mean@4", "mean@4"), ("pass@4", "best@4"), ("maj@4", "maj@4")):
            expected = validated[f"val-core/{source}/reward/{name}"]
            assert model["estimates"][source][metric]["value"] == pytest.approx(expected, abs=1e-6), (source, metric)
    everything = model["estimates"]["all"]["mean@4"]
    assert everything["prompts"] == 8
    assert everything["low"] <= everything["value"] <= everything["high"]
    assert list(model["estimates"]["all"]) == ["mean@4", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4"]


def test_an_interrupted_evaluation_continues(run: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    evaluate(run, "--out", whole)
    evaluate(run, "--out", resumed)
    file = resumed / "run--step-000002.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    marked = lines[1].replace(b'"score":0.0', b'"score":0.75').replace(b'"score":1.0', b'"score":0.75')
    file.write_bytes(b"".join([lines[0], marked, *lines[2:4]]) + lines[4][:40])  # killed in the middle of a line
    printed = evaluate(run, "--out", resumed, "data.val_batch_size=3")
    counts = [line for line in printed.splitlines() if "of 8 prompts" in line]
    assert [line.split()[1] for line in counts] == ["3", "6", "8"]
    after = file.read_bytes().splitlines(keepends=True)
    assert after[1] == marked, "a finished prompt is not generated again"
    assert sorted(after[2:]) == sorted((whole / file.name).read_bytes().splitlines(keepends=True)[2:])


def test_models_are_compared_with_the_first(run: Path, task: Any, tmp_path: Path) -> None:
    checkpoints = sorted((run / "checkpoints").iterdir())
    printed = evaluate(task.model, *checkpoints, "--out", tmp_path / "out", "report.k=[2]", "report.pass_score=0.5")
    names = ["model", "run/step-000001", "run/step-000002"]
    found = results(tmp_path / "out")
    assert [model["name"] for model in found["models"]] == names
    table = " ".join(printed.split())
    assert "data source metric A B C B − A C − A" in table
    assert table.endswith("C: run/step-000002 " + str(tmp_path / "out" / "results.json"))
    for model in found["models"][1:]:
        for source, metrics in model["differences"].items():
            for metric, one in metrics.items():
                first = found["models"][0]["estimates"][source][metric]["value"]
                assert one["value"] == pytest.approx(model["estimates"][source][metric]["value"] - first, abs=1e-9)
                assert one["low"] is None or one["low"] <= one["value"] <= one["high"]
    # another model joins the results that are there
    printed = evaluate(run, "--step", 1, "--out", tmp_path / "out", "report.k=[4]")
    assert next(line for line in printed.splitlines() if "prompts" in line) == "run/step-000001: 8 of 8 prompts"


def test_a_file_of_keys(run: Path, task: Any, tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text(
        f"""
model: {{path: {task.model}}}
data: {{val_files: {task.val}, max_prompt_length: 32, max_response_length: 8, val_limit: 2}}
reward: {{path: "{task.reward}:compute_score"}}
"""
    )
    printed = evaluate("--config", file, "--out", tmp_path / "out")
    (model,) = results(tmp_path / "out")["models"]
    assert model["estimates"]["letters"]["mean@1"]["prompts"] == 2
    assert "maj@" not in printed
    assert "failed rewards" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_worker_processes_evaluate_as_one_process_does(run: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    evaluate(run, "--out", here)
    evaluate(run, "--out", there, "controller.kind=ray", "controller.pools.default.processes=2")
    assert results(here)["models"] == results(there)["models"]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "too few samples for k": (
        ["RUN", "report.k=[8]"],
        "report.k: 8 completions are needed, and rollout.validation.n=4",
    ),
    "greedy samples": (["RUN", "rollout.validation.temperature=0"], "the n=4 completions of a prompt would be equal"),
    "keys of training": (["RUN", "rollout.temperature=0.5"], "rollout.temperature: is for training"),
    "nothing": ([], "give keys, or a file by --config"),
    "an engine that is not installed": (["RUN", "rollout.engine=vlm"], "vllm"),
    "no such folder": (["RUNx"], "there is no such folder; did you mean RUN?"),
    "a step that is not there": (["RUN", "--step", "9"], "has no checkpoint of step 9; the nearest is step-000002"),
    "a mistyped key": (["RUN", "rollout.validation.m=4"], "unknown key; known here: n, temperature"),
    "a server that serves one model": (
        ["RUN", "rollout.engine=sglang", "rollout.sglang.urls=http://127.0.0.1:1"],
        "name that model alone",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(run: Path, tmp_path: Path, case: str) -> None:
    words, says = MISTAKES[case]
    printed = evaluate(*(word.replace("RUN", str(run)) for word in words), "--out", tmp_path / "out", code=1)
    assert says.replace("RUN", str(run)) in printed
    assert not list(tmp_path.iterdir())


def test_results_of_something_else_are_not_mixed(run: Path, task: Any, tmp_path: Path) -> None:
    out, model = tmp_path / "out", tiny_model(tmp_path / "model")
    config = ("--config", run.parent / "eval.yaml", "--out", out)
    (run.parent / "eval.yaml").write_text(
        f"data: {{val_files: {task.val}, max_prompt_length: 32, max_response_length: 4, val_limit: 1}}\n"
        f'reward: {{path: "{task.reward}:compute_score"}}\n'
    )
    evaluate(model, *config)
    assert "under other settings (seed)" in evaluate(model, *config, "seed=1", code=1)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert "holds results of other weights" in evaluate(model, *config, code=1)
    evaluate(model, *config, "--overwrite", "seed=1")
    results_file = out / "model.jsonl"
    results_file.write_text(results_file.read_text().replace('"score":', '"skore":'))
    assert "model.jsonl, line 2 is damaged" in evaluate(model, *config, "seed=1", code=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for taken in (tmp_path / "other", run):
        for more in ((), ("--overwrite",)):
            printed = evaluate(model, *config[:2], "--out", taken, *more, code=1)
            assert "something else than results" in printed
    assert (run / "metrics.jsonl").is_file()
