"""What the gate prints: the runs of tasks, the verdicts of comparisons, and the table algorithm × problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from rlcore_recipes.gate.compare import learned
from rlcore_recipes.gate.results import RunResult
from rlcore_recipes.gate.sequential import SequentialTest, Verdict, acceptance, pairs_needed
from rlcore_recipes.gate.tasks import TASKS, GateTask


def result_line(result: RunResult) -> str:
    """Return one line about a run."""
    first = f"{result.values[0]:.2f} → " if len(result.values) > 1 else ""
    return f"{result.task:24} seed {result.seed}  {first}{result.score:.3f}  {result.seconds:4.0f} s  {result.source}"


def summary_line(task: GateTask, results: Sequence[RunResult]) -> str:
    """Return one line about all runs of ``task``."""
    state = "learned" if learned(task, results) else f"NOT LEARNED (from {task.learned})"
    return f"{task.name:24} {_mean([result.score for result in results])} over {len(results)} seeds  {state}"


def verdict_lines(task: GateTask, verdict: Verdict, test: SequentialTest) -> list[str]:
    """Return what ``verdict`` says about ``task``, and what it rests on."""
    if verdict.outcome == "identical":
        return [f"{task.name:24} identical       the runs of {verdict.pairs} seeds are equal in every metric"]
    line = (
        f"{task.name:24} {verdict.outcome:15} difference {verdict.difference:+.3f} ± {verdict.deviation:.3f} over "
        f"{verdict.pairs} pairs; drop of {test.margin:g} or more: p = {verdict.p:.4f}; any drop: p = "
        f"{verdict.p_harm:.4f}; power {acceptance(test, 0.0, verdict.deviation):.2f}"
    )
    if verdict.outcome != "undecided":
        return [line]
    needed = pairs_needed(test, verdict.deviation)
    return [line, f"{'':24} about {needed} pairs would decide (80 % power): raise --seeds"]


def markdown_table(results: Sequence[RunResult]) -> str:
    """Return the table of results: a row per algorithm, a column per problem, and "first value → score ± error"."""
    found = {name: [result for result in results if result.task == name] for name in TASKS}
    tasks = [task for name, task in TASKS.items() if found[name]]
    problems = list(dict.fromkeys(task.problem for task in tasks))
    rows = [f"| algorithm | {' | '.join(problems)} |", f"|---|{'---|' * len(problems)}"]
    for algorithm in dict.fromkeys(task.algorithm for task in tasks):
        cells = [_cell(found.get(f"{algorithm}-{problem}", [])) for problem in problems]
        rows.append(f"| {algorithm} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(results: Sequence[RunResult]) -> str:
    if not results:
        return ""
    first = fmean(result.values[0] for result in results)
    seconds = fmean(result.seconds for result in results)
    return f"{first:.2f} → {_mean([result.score for result in results])} ({len(results)} seeds, {seconds:.0f} s)"


def _mean(scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return f"{scores[0]:.3f}"
    return f"{fmean(scores):.3f} ± {stdev(scores) / math.sqrt(len(scores)):.3f}"
