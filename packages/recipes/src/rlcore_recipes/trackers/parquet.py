"""Tables as Parquet files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlcore.config import Config
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers.settings import ParquetSettings

STEP_FILE = re.compile(r"step-(\d+)\.parquet")


class ParquetTracker(Tracker):
    """``<folder>/<table>/step-000010.parquet``; a resumed run removes the files of steps that it repeats.

    A column is what all of its cells are (numbers, text, lists …), and text if they differ.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = folder
        for path in folder.glob("*/step-*.parquet"):
            found = STEP_FILE.fullmatch(path.name)
            if found and int(found[1]) > (start_step or -1):
                path.unlink()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing: metrics are in ``metrics.jsonl``."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        arrays = {title: arrow_column([row[index] for row in rows]) for index, title in enumerate(columns)}
        steps = pa.array([step] * len(rows), pa.int64())
        folder = self._folder / name.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:06d}.parquet"
        temporary = path.with_name(f".{path.name}.partial")
        pq.write_table(pa.table({"step": steps, **arrays}), temporary)
        os.replace(temporary, path)


def arrow_column(cells: Sequence[Any]) -> pa.Array:
    """Return ``cells`` as one column, of text if they are of several types."""
    try:
        return pa.array(cells)
    except (
        pa.ArrowException,
        OverflowError,
        UnicodeError,
    ):  # several types, none of Arrow's, or no valid text
        texts = [None if cell is None else str(cell) for cell in cells]
        return pa.array([text and text.encode("utf-8", "backslashreplace").decode() for text in texts], pa.string())


def open_parquet(options: Config, run: RunInfo) -> Tracker:
    """Build the tracker ``parquet``."""
    assert isinstance(options, ParquetSettings)
    return ParquetTracker(run.out_dir / options.folder, run.start_step)
