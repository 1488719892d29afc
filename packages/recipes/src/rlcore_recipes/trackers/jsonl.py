"""Metrics and tables on disk, as lines of JSON."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import warn

from rlcore.config import Config
from rlcore.errors import RlcoreWarning
from rlcore.regular_file import open_regular
from rlcore.tracking import RunInfo, Tracker

METRICS = "metrics.jsonl"
TABLES = "tables"
_LONGEST_LINE = 1 << 26  # bytes


class JsonlTracker(Tracker):
    """``metrics.jsonl``, one line a call, and ``tables/<name>.jsonl``, one line a row.

    A resumed run first removes the lines of steps it is about to repeat, so that no step is there twice. A file
    that is damaged is moved aside; what can be read of it stays. Numbers that are not finite are null.
    """

    def __init__(self, out_dir: Path, start_step: int) -> None:
        self._out_dir = out_dir
        tables = out_dir / TABLES
        if os.path.lexists(tables) and not tables.is_dir():
            _move_aside(tables, "it is no folder")
        tables.mkdir(parents=True, exist_ok=True)
        for path in [out_dir / METRICS, *tables.glob("*.jsonl")]:
            if os.path.lexists(path):
                _keep_until(path, start_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a line with the metrics of ``step``."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        _append(self._out_dir / METRICS, [{"step": step, "time": round(time.time(), 3), **values}])

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        path = self._out_dir / TABLES / f"{name.replace('/', '-')}.jsonl"
        _append(path, [{"step": step, **dict(zip(columns, row))} for row in rows])


def logged_metrics(out_dir: Path, until: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and finite metrics of the lines of ``metrics.jsonl`` up to step ``until``."""
    with open_regular(out_dir / METRICS) as file:
        for line in iter(lambda: file.readline(_LONGEST_LINE), b""):
            step = _step_of(line)
            if step is None or step > until:  # of the run that goes on, under way perhaps
                return
            found = {name: value for name, value in json.loads(line).items() if value is not None}
            yield int(step), {name: value for name, value in found.items() if name not in ("step", "time")}


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    # a lone surrogate, which UTF-8 has not, becomes an escape of JSON's
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def _keep_until(path: Path, step: int) -> None:
    """Remove lines of later steps, and one that a crash cut off; a run from the start keeps none."""
    temporary, problem = path.with_name(f".{path.name}.partial"), ""
    with temporary.open("wb") as kept:
        try:
            with open_regular(path) as file:
                for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
                    found = _step_of(line)
                    if found is not None and found <= step > 0:
                        kept.write(line.rstrip(b"\n") + b"\n")
                    elif found is None and (line.endswith(b"\n") or len(line) == _LONGEST_LINE):
                        problem = problem or f"line {number} is no JSON object with a step"
        except OSError as error:
            problem = error.strerror or str(error)
    if problem:
        _move_aside(path, problem)
    os.replace(temporary, path)


def _step_of(line: bytes) -> float | None:
    """Return the step of a line; None if it is none of ours."""
    try:
        step = json.loads(line.decode("utf-8"))["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, (int, float)) else None


def _move_aside(path: Path, problem: str) -> None:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    os.rename(path, aside)
    warn(f"{path} is damaged ({problem}); it is now {aside.name}, and what could be read of it stays", RlcoreWarning, 2)


def open_jsonl(options: Config, run: RunInfo) -> Tracker:
    """Build the tracker ``jsonl``."""
    return JsonlTracker(run.out_dir, run.start_step)
