"""The learning gate without training: tasks, results, baselines, and what is said of mistakes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlcore.cli.command_tree import cli
from rlcore.errors import DataError
from rlcore_recipes.gate.baseline import open_baseline
from rlcore_recipes.gate.compare import Arm, Gate, compare
from rlcore_recipes.gate.report import markdown_table, verdict_lines
from rlcore_recipes.gate.results import Results, RunResult, read_results, result_of
from rlcore_recipes.gate.sequential import SequentialTest
from rlcore_recipes.gate.tasks import TASKS, GateTask

TASK = TASKS["grpo-letters"]
METRIC = TASK.metric


def result(seed: int, score: float, task: GateTask = TASK, digest: float = 0.0) -> RunResult:
    lines = [{METRIC: 0.1, "perf/time_per_step": 9.0}, *({METRIC: score, "actor/loss": digest},) * 3]
    return result_of(task, seed, lines, 5.0, "test")


def arm(name: str, *scores: float, digest: float = 0.0) -> Arm:
    results = Results()
    for seed, score in enumerate(scores):
        results.add(result(seed, score, digest=digest))
    return Arm(name, results)


def test_the_score_is_the_mean_of_the_last_values_and_the_digest_ignores_times() -> None:
    lines = [{METRIC: value, "perf/time_per_step": 1.0, "actor/loss": 2.0} for value in (0.0, 0.1, 0.7, 0.8, 0.9)]
    found = result_of(TASK, 3, lines, 1.0, "here")
    assert found.score == pytest.approx(0.8)
    assert found.values == (0.0, 0.1, 0.7, 0.8, 0.9)
    slower = [{**line, "perf/time_per_step": 2.0} for line in lines]
    assert result_of(TASK, 3, slower, 9.0, "there").digest == found.digest
    other = [*lines[:-1], {**lines[-1], "actor/loss": 2.000001}]
    assert result_of(TASK, 3, other, 1.0, "here").digest != found.digest
    with pytest.raises(DataError, match=f"logged no {METRIC}"):
        result_of(TASK, 3, [{"actor/loss": 1.0}], 1.0, "here")


def test_results_are_kept_in_a_file_and_belong_to_the_definition_of_their_task(tmp_path: Path) -> None:
    file = tmp_path / "some/results.jsonl"
    results = Results(file)
    for seed in (1, 0):
        results.add(result(seed, 0.5))
    assert Results(file).of(TASK) == [result(0, 0.5), result(1, 0.5)]
    longer = replace(TASK, keys={**TASK.keys, "trainer.total_steps": 99})
    assert Results(file).of(longer) == []
    file.write_text(file.read_text() + '{"task": "grpo-letters", "seed": -1}\n')
    with pytest.raises(DataError, match=r"results.jsonl, line 3, is no result of the gate: "):
        read_results(file)
    with pytest.raises(DataError, match="cannot be read: "):
        read_results(tmp_path)


def test_verdicts_need_no_more_pairs_than_they_use(tmp_path: Path) -> None:
    gate, test = Gate(tmp_path), SequentialTest(0.1, looks=(3, 4, 5, 6))
    same = compare(TASK, arm("old", 0.9, 0.8, 0.85), arm("new", 0.9, 0.8, 0.85), test, gate)
    assert (same.outcome, same.pairs) == ("identical", 3)
    close = compare(TASK, arm("old", 0.9, 0.8, 0.85), arm("new", 0.91, 0.79, 0.86, digest=1.0), test, gate)
    assert (close.outcome, close.pairs) == ("does not hurt", 3)
    worse = compare(TASK, arm("old", 0.9, 0.9, 0.9), arm("new", 0.5, 0.52, 0.49), test, gate)
    assert worse.outcome == "hurts"
    unclear = compare(TASK, arm("old", 0.9, 0.5, 0.9), arm("new", 0.5, 0.9, 0.8), test, gate)
    assert (unclear.outcome, unclear.pairs) == ("undecided", 3)  # the baseline has no more seeds
    assert "pairs would decide" in verdict_lines(TASK, unclear, test)[1]
    with pytest.raises(DataError, match="old has 2 of the 3 seeds of grpo-letters"):
        compare(TASK, arm("old", 0.9, 0.9), arm("new", 0.9, 0.9, 0.9), test, gate)


def test_the_table_has_a_row_per_algorithm_and_a_column_per_problem() -> None:
    ppo = TASKS["ppo-letters"]
    table = markdown_table([result(0, 0.8), result(1, 0.9), result(0, 0.7, ppo)])
    assert table.splitlines() == [
        "| algorithm | letters |",
        "|---|---|",
        "| grpo | 0.10 → 0.850 ± 0.050 (2 seeds, 5 s) |",
        "| ppo | 0.10 → 0.700 (1 seeds, 5 s) |",
    ]


def test_a_baseline_is_a_file_an_interpreter_or_a_revision(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    Results(file).add(result(0, 0.5))
    assert open_baseline(str(file), tmp_path).results.of(TASK) == [result(0, 0.5)]
    assert open_baseline(sys.executable, tmp_path).python == Path(sys.executable)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run", "grpo-leters"], "the gate has no task 'grpo-leters'; did you mean grpo-letters"),
        (["compare", "grpo-letters", "--baseline", "no-such.jsonl"], "there is no such file"),
        (["compare", "grpo-letters", "--baseline", "no-such-thing"], "nor a revision of a git repository"),
        (["compare", "--baseline", "main", "--seeds", "2"], "2 is not in the range x>=3"),
        (["table", "no-such.jsonl"], "no-such.jsonl cannot be read"),
    ],
)
def test_mistakes_are_said_in_a_sentence(
    arguments: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["gate", *arguments])
    assert done.exit_code != 0
    assert problem in done.output


def test_every_task_is_listed_and_has_a_configuration_that_is_valid(tmp_path: Path) -> None:
    from rlcore import plugins
    from rlcore.config import load_config
    from rlcore_recipes.gate.run import arguments

    listed = CliRunner().invoke(cli, ["gate", "list"]).output
    for name, task in TASKS.items():
        assert name in listed
        plugin = plugins.get("rlcore.recipes", task.recipe)
        load_config(plugin.config_class(), None, arguments(task, 0, tmp_path)[2:])
