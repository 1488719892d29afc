"""Writing prepared data."""

from __future__ import annotations

import os
from pathlib import Path

from rlcore.errors import DataError
from rlcore_recipes.data.prepare.rows import Splits


def write_splits(splits: Splits, out: Path, overwrite: bool = False) -> dict[Path, int]:
    """Write ``<split>.parquet`` for every split, all or none of them.

    Returns:
        the rows of each file.

    Raises:
        DataError: a file exists and ``overwrite`` is off, a split is empty, or its rows do not fit together.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    targets = {name: out / f"{name}.parquet" for name in splits}
    existing = [str(path) for path in targets.values() if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{' and '.join(existing)} exist already; use --overwrite, or another folder")
    tables = {}
    for name, rows in splits.items():
        if not rows:
            raise DataError(f"split {name!r} has no rows")
        try:
            tables[name] = pa.Table.from_pylist(rows)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"the rows of split {name!r} do not have the same types: {error}") from error
    temporary = {name: path.with_suffix(f".{os.getpid()}.tmp") for name, path in targets.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            pq.write_table(table, temporary[name])
        for name, path in targets.items():
            os.replace(temporary[name], path)
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error}") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return {targets[name]: table.num_rows for name, table in tables.items()}
