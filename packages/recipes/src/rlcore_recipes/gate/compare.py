"""Compare a candidate with a baseline, seed by seed, until the test has seen enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rlcore.errors import DataError
from rlcore_recipes.gate.problems import prepare
from rlcore_recipes.gate.results import Results, RunResult
from rlcore_recipes.gate.run import run_task
from rlcore_recipes.gate.sequential import SequentialTest, Verdict, decide
from rlcore_recipes.gate.tasks import GateTask

Report = Callable[[RunResult], None]


def ignore(result: RunResult) -> None:
    """Report nothing."""


@dataclass
class Arm:
    """One of the versions that are compared.

    Attributes:
        source: its name.
        results: what it has run.
        python: its interpreter; None where results are all there is.
    """

    source: str
    results: Results = field(default_factory=Results)
    python: Path | None = None

    def has(self, task: GateTask, seed: int) -> bool:
        """Return whether it has run, or can run, ``task`` with ``seed``."""
        return self.python is not None or self.results.get(task, seed) is not None


@dataclass(frozen=True)
class Gate:
    """Where and how many runs are made at a time."""

    root: Path
    jobs: int = 2
    report: Report = ignore

    def measure(self, wanted: Iterable[tuple[Arm, GateTask, int]]) -> None:
        """Run what is not there yet, `jobs` at a time."""
        missing = [
            (arm, task, seed) for arm, task, seed in wanted if arm.results.get(task, seed) is None and arm.python
        ]
        for task in {task.problem: task for _, task, _ in missing}.values():
            prepare(task.files, self.root)

        def run(arm: Arm, task: GateTask, seed: int) -> tuple[Arm, RunResult]:
            assert arm.python is not None
            return arm, run_task(task, seed, self.root, arm.python, arm.source)

        with ThreadPoolExecutor(self.jobs) as pool:
            started = [pool.submit(run, *one) for one in missing]
            try:
                for future in started:
                    arm, result = future.result()
                    arm.results.add(result)
                    self.report(result)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def compare(task: GateTask, baseline: Arm, candidate: Arm, test: SequentialTest, gate: Gate) -> Verdict:
    """Run ``task`` in both arms with seeds 0, 1, 2, …, until ``test`` stops.

    Raises:
        DataError: the baseline is a file of results with fewer seeds than the first look needs.
        RlcoreError: a run failed.
    """
    pairs: list[tuple[RunResult, RunResult]] = []
    verdict = decide([], test)
    for look in test.looks:
        seeds = [seed for seed in range(look) if baseline.has(task, seed)]
        if len(seeds) < test.looks[0]:
            raise DataError(
                f"{baseline.source} has {len(seeds)} of the {test.looks[0]} seeds of {task.name}, as this version "
                "defines it, that a comparison needs: name a revision or an interpreter as --baseline"
            )
        if len(seeds) < look:
            return verdict
        gate.measure((arm, task, seed) for seed in seeds for arm in (baseline, candidate))
        pairs = [(_result(baseline, task, seed), _result(candidate, task, seed)) for seed in seeds]
        differences = [after.score - before.score for before, after in pairs]
        verdict = decide(differences, test, all(before.digest == after.digest for before, after in pairs))
        if verdict.final:
            return verdict
    return verdict


def _result(arm: Arm, task: GateTask, seed: int) -> RunResult:
    found = arm.results.get(task, seed)
    assert found is not None
    return found


def learned(task: GateTask, results: Sequence[RunResult]) -> bool:
    """Return whether the mean score of ``results`` is that of a policy that has learned."""
    return sum(result.score for result in results) / len(results) >= task.learned
