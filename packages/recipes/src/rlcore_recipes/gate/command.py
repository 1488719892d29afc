"""``rlcore-gate``, which is also ``rlcore gate``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rlcore.cli.folder import Folder

_ROOT = click.option(
    "--root",
    type=Folder(),
    default=Path("rlcore-gate"),
    show_default=True,
    help="Folder of data, first models and runs; what is there is not made again.",
)
_JOBS = click.option(
    "--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Runs at a time, of one thread each."
)
_TASKS = click.argument("tasks", nargs=-1, metavar="[TASK]...")


def main() -> None:
    """Entry point of the console script ``rlcore-gate``; ends the process."""
    from rlcore.cli import main as rlcore

    rlcore(["gate", *sys.argv[1:]])


@click.group()
def gate() -> None:
    """Train tiny tasks, and test whether a change hurts learning.

    \b
    rlcore-gate run grpo-letters              train a task, with three seeds
    rlcore-gate compare --baseline v0.1.0     compare this environment with a revision
    """


@gate.command("list")
def list_tasks() -> None:
    """List the tasks."""
    from rlcore_recipes.gate.tasks import FAST, TASKS

    for task in TASKS.values():
        runs = "fast" if task.name in FAST else ""
        click.echo(
            f"{task.name:24} recipe {task.recipe:10} learned from {task.learned:<5} {runs:5}{task.files.summary}"
        )


@gate.command()
@_TASKS
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each task.")
@click.option("--out", type=click.Path(path_type=Path), help="File of results to add to (*.jsonl).")
@_ROOT
@_JOBS
def run(tasks: tuple[str, ...], seeds: int, out: Path | None, root: Path, jobs: int) -> None:
    """Train tasks (default: all); the exit code is 1 if one is not learned."""
    from rlcore_recipes.gate import report
    from rlcore_recipes.gate.compare import Arm, Gate, learned
    from rlcore_recipes.gate.results import Results
    from rlcore_recipes.gate.tasks import find_tasks

    chosen = find_tasks(tasks)
    arm = Arm(_version(), Results(out), Path(sys.executable))
    runner = Gate(root.absolute(), jobs, lambda result: click.echo(report.result_line(result), err=True))
    runner.measure((arm, task, seed) for task in chosen for seed in range(seeds))
    found = [(task, arm.results.of(task)) for task in chosen]
    for task, results in found:
        click.echo(report.summary_line(task, results))
    sys.exit(0 if all(learned(task, results) for task, results in found) else 1)


@gate.command()
@_TASKS
@click.option(
    "--baseline",
    required=True,
    help="File of results (*.jsonl), Python interpreter of another environment, or git revision.",
)
@click.option("--seeds", type=click.IntRange(min=3), default=8, show_default=True, help="Maximum pairs of a task.")
@click.option("--margin", type=float, help="Drop of the score that counts as harm  [default: of the task]")
@click.option(
    "--alpha", type=click.FloatRange(1e-4, 0.5), default=0.05, show_default=True, help="Probability of each error."
)
@_ROOT
@_JOBS
def compare(
    tasks: tuple[str, ...], baseline: str, seeds: int, margin: float | None, alpha: float, root: Path, jobs: int
) -> None:
    """Test whether this environment's rlcore learns as well as a baseline (default: all tasks).

    The exit code is 0 if no task is hurt by the margin, and 1 if one is, or if the pairs do not decide it.
    """
    from rlcore_recipes.gate import report
    from rlcore_recipes.gate.baseline import open_baseline
    from rlcore_recipes.gate.compare import Arm, Gate
    from rlcore_recipes.gate.compare import compare as compare_task
    from rlcore_recipes.gate.sequential import SequentialTest
    from rlcore_recipes.gate.tasks import find_tasks

    chosen, root = find_tasks(tasks), root.absolute()
    before, after = open_baseline(baseline, root), Arm("candidate", python=Path(sys.executable))
    runner = Gate(root, jobs, lambda result: click.echo(report.result_line(result), err=True))
    accepted = True
    for task in chosen:
        looks = tuple(range(3, seeds + 1))
        test = SequentialTest(margin or task.margin, alpha, alpha / len(chosen), looks)
        verdict = compare_task(task, before, after, test, runner)
        accepted &= verdict.outcome in ("identical", "does not hurt")
        click.echo("\n".join(report.verdict_lines(task, verdict, test)))
    click.echo(
        f"this change does not hurt learning (errors of at most {alpha:g})"
        if accepted
        else "not shown: this change may hurt learning"
    )
    sys.exit(0 if accepted else 1)


@gate.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
def table(files: tuple[Path, ...]) -> None:
    """Print files of results as a Markdown table, algorithm × problem."""
    from rlcore_recipes.gate.report import markdown_table
    from rlcore_recipes.gate.results import read_results

    click.echo(markdown_table([result for file in files for result in read_results(file)]))


def _version() -> str:
    import rlcore

    return f"rlcore {rlcore.__version__}"
