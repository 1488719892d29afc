"""Results of gate runs: one line of JSON per run, in a file that later runs add to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field, ValidationError

from rlcore.errors import DataError
from rlcore.regular_file import read_regular
from rlcore_kit.checkpoint.json_file import Finite, JsonFile, first_problem
from rlcore_recipes.gate.tasks import GateTask

LARGEST = 64 << 20
"""Bytes of a file of results."""
REPRODUCIBLE = ("actor/", "critic/", "train/", "val-core/", "rm/", "distill/")
"""Metrics that are equal if two runs are the same: those without times and memory."""


class RunResult(JsonFile):
    """One run of a task."""

    task: str = Field(description="Name of the task.")
    definition: str = Field(description="`GateTask.definition` of the task.")
    seed: int = Field(ge=0, description="Seed of the run.")
    values: tuple[Finite, ...] = Field(min_length=1, description="Values of the task's metric, in order.")
    score: Finite = Field(description="Mean of the last values.")
    digest: str = Field(description="Hash of all metrics that are equal in equal runs.")
    seconds: float = Field(ge=0, description="Duration of the run's process.")
    source: str = Field(description="Version or revision that ran.")


def result_of(
    task: GateTask, seed: int, metrics: Sequence[Mapping[str, Any]], seconds: float, source: str
) -> RunResult:
    """Return the result of a run from the lines of its ``metrics.jsonl``.

    Raises:
        DataError: the run logged no value of the task's metric.
    """
    values = [float(line[task.metric]) for line in metrics if task.metric in line]
    if not values:
        raise DataError(f"the run of {task.name} logged no {task.metric}, by which the task is measured")
    kept = [{k: v for k, v in sorted(line.items()) if k.startswith(REPRODUCIBLE)} for line in metrics]
    digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]
    return RunResult(
        task=task.name,
        definition=task.definition,
        seed=seed,
        values=tuple(values),
        score=fmean(values[-task.last :]),
        digest=digest,
        seconds=round(seconds, 1),
        source=source,
    )


class Results:
    """Results by task and seed; with a file, what is added is written to it."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._found = {(one.task, one.seed): one for one in (read_results(path) if path and path.exists() else ())}

    def get(self, task: GateTask, seed: int) -> RunResult | None:
        """Return the result of ``task`` with ``seed``; None if it has not run, or was defined in another way."""
        found = self._found.get((task.name, seed))
        return None if found is None or found.definition != task.definition else found

    def of(self, task: GateTask) -> list[RunResult]:
        """Return the results of ``task`` in the order of seeds."""
        seeds = sorted(seed for name, seed in self._found if name == task.name)
        return [found for seed in seeds if (found := self.get(task, seed)) is not None]

    def add(self, result: RunResult) -> None:
        """Add ``result``, and write it to the file."""
        self._found[result.task, result.seed] = result
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(result.model_dump_json() + "\n")


def read_results(path: Path) -> list[RunResult]:
    """Read a file of results.

    Raises:
        DataError: it cannot be read, or a line is no result.
    """
    try:
        lines = read_regular(path, LARGEST).decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [RunResult.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            raise DataError(f"{path}, line {number}, is no result of the gate: {first_problem(error)}") from None
    return found
