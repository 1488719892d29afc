"""Metrics and tables on disk, as lines of JSON."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcore.config import Config
from rlcore.tracking import RunInfo, Tracker

METRICS = "metrics.jsonl"
TABLES = "tables"


class JsonlTracker(Tracker):
    """``metrics.jsonl``, one line a call, and ``tables/<name>.jsonl``, one line a row.

    A resumed run first removes the lines of steps it is about to repeat, so that no step stands there twice. Numbers
    that are not finite are null.
    """

    def __init__(self, out_dir: Path, start_step: int) -> None:
        self._out_dir = out_dir
        (out_dir / TABLES).mkdir(parents=True, exist_ok=True)
        for path in [out_dir / METRICS, *(out_dir / TABLES).glob("*.jsonl")]:
            if path.exists():
                _keep_until(path, start_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        _append(self._out_dir / METRICS, [{"step": step, "time": round(time.time(), 3), **values}])

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        path = self._out_dir / TABLES / f"{name.replace('/', '-')}.jsonl"
        _append(path, [{"step": step, **dict(zip(columns, row))} for row in rows])


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def _keep_until(path: Path, step: int) -> None:
    """Remove lines of later steps, and one that a crash cut off; a run from the start keeps none."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if step and json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except ValueError:
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def open_jsonl(options: Config, run: RunInfo) -> Tracker:
    return JsonlTracker(run.out_dir, run.start_step)
