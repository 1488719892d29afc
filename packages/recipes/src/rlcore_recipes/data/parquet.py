"""Rows of Parquet files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from warnings import warn

from rlcore.boundary import boundary
from rlcore.errors import DataError, RlcoreWarning
from rlcore_recipes.data.columns import Columns, Row

BATCH_BYTES = 64 << 20
"""Bytes of Arrow data, about, that are converted at a time."""


def read_parquet(path: Path, columns: Columns, limit: int | None = None) -> list[Row]:
    """Read the rows of a Parquet file; only the first ``limit`` if that is given.

    A row group is read in batches: Arrow cannot hold more than 2 GiB of nested text in one array. Columns that
    ``columns`` leaves out are not read at all. Times that Python's datetime cannot hold become text, with a warning.

    Raises:
        DataError: names the file, and the column if it is one that cannot be read.
    """
    import pyarrow.parquet as pq

    with boundary(f"{path} cannot be read as Parquet"):
        file = pq.ParquetFile(path)
        names, fields = list(file.schema_arrow.names), list(_fields(file.schema_arrow))
    with file:
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(f"{path} has more than one column {twice[0]!r}; rename one of them")
        columns.require(fields, str(path))
        chosen = columns.chosen(names)
        rows: list[Row] = []
        as_text: set[str] = set()
        for group in range(file.num_row_groups):
            missing = None if limit is None else limit - len(rows)
            if missing is not None and missing <= 0:
                break
            rows += _group(file, group, chosen, path, as_text, missing)
    if as_text:
        warn(
            f"{path}: times in column {', '.join(sorted(as_text))} do not fit Python's datetime and are read as text",
            RlcoreWarning,
            stacklevel=2,
        )
    return rows


def _group(file: Any, group: int, columns: list[str], path: Path, as_text: set[str], limit: int | None) -> list[Row]:
    """Read the first ``limit`` rows of one row group; add columns whose times had to become text to ``as_text``."""
    sizes = file.metadata.row_group(group)
    wanted = sizes.num_rows if limit is None else min(limit, sizes.num_rows)
    size = max(1, min(wanted, sizes.num_rows * BATCH_BYTES // max(sizes.total_byte_size, 1)))
    try:
        return list(islice(_rows(file, group, columns, size, as_text), limit))
    except Exception:
        size = 1  # values that repeat take less room in the file than in memory: a batch may be too large for Arrow
    with boundary(f"{path}, row group {group}, cannot be read"):
        try:
            return list(islice(_rows(file, group, columns, size, as_text), limit))
        except Exception:
            for name in columns:
                with boundary(f"{path}, column {name!r} of row group {group} cannot be read"):
                    list(islice(_rows(file, group, [name], size, set()), limit))
            raise


def _rows(file: Any, group: int, columns: list[str], size: int, as_text: set[str]) -> Iterator[Row]:
    for batch in file.iter_batches(size, row_groups=[group], columns=columns):
        try:
            yield from batch.to_pylist()
        except (ValueError, OverflowError):
            yield from _row_by_row(batch, as_text)


def _row_by_row(batch: Any, as_text: set[str]) -> Iterator[Row]:
    for index in range(batch.num_rows):
        row = {}
        for name, values in zip(batch.schema.names, batch.columns):
            try:
                row[name] = values[index].as_py()
            except (ValueError, OverflowError):
                row[name] = _with_times_as_text(values[index])
                as_text.add(name)
        yield row


def _with_times_as_text(scalar: Any) -> Any:
    """Return the value of an Arrow scalar, in which times that Python's datetime cannot hold are text."""
    import pyarrow as pa

    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        if isinstance(scalar, pa.StructScalar):
            return {name: _with_times_as_text(scalar[name]) for name in scalar}
        if isinstance(scalar, pa.ListScalar):
            return [_with_times_as_text(value) for value in scalar.values]
        if not pa.types.is_temporal(scalar.type):
            raise
        return scalar.cast(pa.string()).as_py()


def _fields(fields: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of columns, and of the fields of structs with dots."""
    import pyarrow as pa

    for field in fields:
        yield f"{prefix}{field.name}"
        if pa.types.is_struct(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
