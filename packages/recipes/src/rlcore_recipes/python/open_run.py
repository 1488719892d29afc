"""`rlcore.open_run`: what a run left in its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlcore.boundary import boundary
from rlcore.errors import CheckpointError, DataError
from rlcore.regular_file import open_regular
from rlcore.suggestions import similar_paths
from rlcore.training_run import TrainingRun
from rlcore_recipes.checkpoint.storage import open_storage
from rlcore_recipes.run.folder import CHECKPOINTS, CONFIG, MODEL, read_config, read_plan
from rlcore_recipes.trackers.jsonl import METRICS, TABLES
from rlcore_recipes.trackers.parquet import arrow_column

ROLLOUTS = {"train": f"{TABLES}/rollouts.jsonl", "validation": f"{TABLES}/val-generations.jsonl"}
"""Files of the tables of completions, by what `TrainingRun.rollouts` calls the steps that made them."""


def open_run(out_dir: str | os.PathLike[str]) -> TrainingRun:
    """Read the results of a run; see `rlcore.launch.open_run`."""
    folder = Path(out_dir)
    with boundary(f"{folder / CONFIG} cannot be read"):
        if not (folder / CONFIG).is_file():
            raise DataError(f"{folder} holds no run: there is no {CONFIG} in it{similar_paths(folder)}")
        config = read_config(folder / CONFIG)
        exports, root = config["trainer"]["save_hf"], config["trainer"]["checkpoint_dir"]
    steps = list(_lines(folder / METRICS))
    rollouts = [{"split": split, **row} for split, name in ROLLOUTS.items() for row in _lines(folder / name)]
    plan, model = read_plan(folder), folder / MODEL
    complete = bool(steps) and plan is not None and steps[-1]["step"] >= plan.total_steps
    complete = complete and (model.is_dir() or not exports)
    return TrainingRun(
        out_dir=folder,
        complete=complete,
        model_path=model if complete and model.is_dir() else None,
        checkpoints=list(_checkpoints(root or str(folder / CHECKPOINTS))),
        metrics=_metrics_table(steps),
        rollouts=_table(sorted(rollouts, key=itemgetter("step"))),
        config=config,
    )


def _checkpoints(root: str) -> Iterator[str]:
    """Yield the checkpoints that are complete, the oldest first."""
    storage = open_storage(root)
    for name in storage.names():
        with suppress(CheckpointError):  # not complete
            storage.manifest(name)
            yield f"{root}/{name}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of the tracker ``jsonl``, which may be writing its last line."""
    if not os.path.lexists(path):
        return
    with boundary(f"{path} cannot be read"), open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            with boundary(f"{path}, line {number} is damaged"):
                found = json.loads(line)
                yield {"step": int(found.pop("step")), **found}


def _metrics_table(steps: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = dict.fromkeys(["step", *(name for step in steps for name in step)])
    with boundary("the metrics of the run are damaged"):
        kinds = {name: pa.int64() if name == "step" else pa.float64() for name in names}
        return pa.table({name: pa.array([step.get(name) for step in steps], kind) for name, kind in kinds.items()})


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: arrow_column([row.get(name) for row in rows]) for name in names})
