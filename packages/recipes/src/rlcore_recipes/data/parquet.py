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
from rlcore_recipes.data.layouts import Choose
from rlcore_recipes.data.media import may_be_media, refuse_media

BATCH_BYTES = 64 << 20
"""Bytes of Arrow data, about, that are converted at a time."""


def read_parquet(path: Path, choose: Choose, limit: int | None = None) -> tuple[Columns, Iterator[list[Row]]]:
    """Return the columns of a Parquet file that are read, and its rows, some at a time.

    A row group is read in batches: Arrow cannot hold more than 2 GiB of nested text in one array. Columns that are not
    chosen are not read at all. Times that Python's datetime cannot hold become text, with a warning.

    Args:
        limit: read only the first rows.

    Raises:
        DataError: names the file, and the column if it is one that cannot be read.
    """
    import pyarrow.parquet as pq

    with boundary(f"{path} cannot be read as Parquet"):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        names, fields = list(schema.names), list(_fields(schema))
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path} has more than one column {twice[0]!r}; rename one of them")
    columns = choose(fields, str(path)) if file.metadata.num_rows else Columns()
    media = [field.name for field in schema if may_be_media(field.name, list(_all_fields(field.type)))]
    return columns, _file_rows(file, path, columns.chosen(names), media, limit)


def _file_rows(file: Any, path: Path, columns: list[str], media: list[str], limit: int | None) -> Iterator[list[Row]]:
    """Yield the rows in ``columns``, after a look at those that may hold ``media``."""
    as_text: set[str] = set()
    read = 0
    with file:
        for group in range(file.num_row_groups):
            sizes = file.metadata.row_group(group)
            wanted = sizes.num_rows if limit is None else min(limit - read, sizes.num_rows)
            size = max(1, min(wanted, sizes.num_rows * BATCH_BYTES // max(sizes.total_byte_size, 1)))
            if wanted <= 0:
                break
            if media:
                refuse_media(_group(file, group, media, path, set(), wanted, size), str(path), read)
            rows = _group(file, group, columns, path, as_text, wanted, size)
            while chunk := list(islice(rows, size)):
                yield chunk
            read += wanted
    if as_text:
        warn(
            f"{path}: times in column {', '.join(sorted(as_text))} do not fit Python's datetime and are read as text",
            RlcoreWarning,
            stacklevel=2,
        )


def _group(
    file: Any, group: int, columns: list[str], path: Path, as_text: set[str], wanted: int, size: int
) -> Iterator[Row]:
    """Yield the first ``wanted`` rows of a row group, which are read ``size`` at a time.

    Columns whose times had to become text are added to ``as_text``.
    """
    read = 0
    try:
        for row in islice(_rows(file, group, columns, size, as_text), wanted):
            read += 1
            yield row
        return
    except Exception:
        size = 1  # values that repeat take less room in the file than in memory: a batch may be too large for Arrow
    with boundary(f"{path}, row group {group}, cannot be read"):
        try:
            yield from islice(_rows(file, group, columns, size, as_text), read, wanted)
        except Exception:
            for name in columns:
                with boundary(f"{path}, column {name!r} of row group {group} cannot be read"):
                    list(islice(_rows(file, group, [name], size, set()), wanted))
            raise


def _rows(file: Any, group: int, columns: list[str], size: int, as_text: set[str]) -> Iterator[Row]:
    for batch in file.iter_batches(size, row_groups=[group], columns=columns):
        if any(map(_has_nanoseconds, batch.schema.types)):
            yield from _row_by_row(batch, as_text)
            continue
        try:
            yield from batch.to_pylist()
        except (ValueError, OverflowError):
            yield from _row_by_row(batch, as_text)


def _row_by_row(batch: Any, as_text: set[str]) -> Iterator[Row]:
    for index in range(batch.num_rows):
        yield {
            name: _with_times_as_text(values[index], name, as_text)
            for name, values in zip(batch.schema.names, batch.columns)
        }


def _with_times_as_text(scalar: Any, column: str, as_text: set[str]) -> Any:
    """Return the value of an Arrow scalar, in which times that Python's datetime cannot hold are text.

    Arrow makes times in nanoseconds pandas' where that is installed, which is not left to chance.
    """
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        return {name: _with_times_as_text(scalar[name], column, as_text) for name in scalar}
    if isinstance(scalar, pa.ListScalar):
        return [_with_times_as_text(value, column, as_text) for value in scalar.values]
    if not pa.types.is_temporal(scalar.type):
        return scalar.as_py()
    try:
        if not _has_nanoseconds(scalar.type):
            return scalar.as_py()
        if not scalar.value % 1000:
            return scalar.cast(_in_microseconds(scalar.type)).as_py()
    except (ValueError, OverflowError):
        pass
    as_text.add(column)
    return scalar.cast(pa.string()).as_py()


def _has_nanoseconds(kind: Any) -> bool:
    """Return whether an Arrow type is of times in nanoseconds, or has them inside."""
    return getattr(kind, "unit", None) == "ns" or any(
        _has_nanoseconds(kind.field(index).type) for index in range(kind.num_fields)
    )


def _in_microseconds(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")


def _all_fields(kind: Any) -> Iterator[str]:
    """Yield the names of the fields of structs in an Arrow type, at any depth."""
    for index in range(kind.num_fields):
        yield kind.field(index).name
        yield from _all_fields(kind.field(index).type)


def _fields(fields: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of columns, and of the fields of structs with dots."""
    import pyarrow as pa

    for field in fields:
        yield f"{prefix}{field.name}"
        if pa.types.is_struct(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
