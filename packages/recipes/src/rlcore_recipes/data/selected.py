"""Completions that a run kept, as Parquet files that the recipe ``sft`` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import ConfigError
from rlcore_recipes.trackers.parquet import arrow_column


def write_selected(folder: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``step-000001.parquet`` with ``rows``, and nothing if there are none.

    Prompts are messages or text, which one Parquet column cannot mix: where a data set has both, those of text go to
    ``step-000001-text.parquet``.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    chat = [row for row in rows if not isinstance(row["prompt"], str)]
    text = [row for row in rows if isinstance(row["prompt"], str)]
    name = f"step-{step:06d}"
    files = {f"{name}.parquet": chat or text, f"{name}-text.parquet": text if chat else []}
    with boundary(f"the completions of step {step} cannot be written to {folder}", ConfigError):
        folder.mkdir(parents=True, exist_ok=True)
        for file, found in files.items():
            _write(folder / file, found)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows`` to ``path``, completely or not at all; a file of an earlier attempt at the step is replaced."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.table({name: arrow_column([row[name] for row in rows]) for name in rows[0]}), temporary)
    os.replace(temporary, path)
