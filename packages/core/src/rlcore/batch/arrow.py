"""The columns of a batch as Arrow tables and files; `rlcore.batch.Batch` reads and writes both.

========  ==================================================================  ==========================
column    Arrow type                                                          copied?
========  ==================================================================  ==========================
jagged    ``large_list`` of the values, offsets from ``lengths``              no (``bool``: packed to bits)
dense     a plain column; ``[B, d, ...]`` as nested ``fixed_size_list``       no (``bool``: packed to bits)
objects   ``large_string`` if all are strings, else JSON in ``large_string``  yes
========  ==================================================================  ==========================

Trailing dimensions are nested ``fixed_size_list``. A dtype that Arrow lacks (bfloat16, the float8s) is stored as its
bits. Each field's metadata holds the kind and the dtype, so that a round trip is exact; JSON brings tuples back as
lists and the keys of dicts as strings.

`load` maps ``.arrow`` files into memory copy-on-write: tensors are views of the file, read when they are touched.
Parquet is compressed and therefore read and copied. Batches that lie on a GPU come back on the CPU.
"""

from __future__ import annotations

import json
import mmap
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlcore.batch.jagged import Column, Jagged
from rlcore.batch.memory import dtype_name, from_numpy, to_numpy
from rlcore.errors import BatchError, DataError

FORMAT = "1"
_FORMAT_KEY, _FIELD_KEY = b"rlcore.batch", b"rlcore.column"
# White space in front of every JSON text, which parsers skip. The texts are marked, not the column: where tables are
# put together, Arrow keeps the metadata of the first one only.
_JSON = "\r"


def to_arrow(columns: Mapping[str, Column]) -> pa.Table:
    """Return ``columns`` as a table of one chunk, over the same memory where the table above says so.

    Raises:
        BatchError: a column holds what Arrow or JSON cannot (complex numbers, arbitrary objects).
    """
    arrays, fields = [], []
    for name, column in columns.items():
        array, about = _to_array(name, column)
        arrays.append(array)
        fields.append(pa.field(name, array.type, nullable=False, metadata={_FIELD_KEY: json.dumps(about)}))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata={_FORMAT_KEY: FORMAT}))


def from_arrow(table: pa.Table) -> list[dict[str, Column | Sequence[Any]]]:
    """Return the columns that `to_arrow` wrote into ``table`` (read from Arrow or Parquet, sliced or concatenated).

    Returns:
        the columns of every chunk, at least one: batches are simpler and safer to concatenate than nested Arrow chunks.

    Raises:
        DataError: the table does not come from `to_arrow`.
    """
    written = (table.schema.metadata or {}).get(_FORMAT_KEY)
    if written is None:
        raise DataError("the table was not written by Batch (its schema lacks the metadata of rlcore.batch)")
    if written != FORMAT.encode():
        raise DataError(f"the table is in format {written.decode()} of rlcore.batch; this version reads {FORMAT}")
    chunks = table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
    return [
        {field.name: _from_array(chunk.column(i), field) for i, field in enumerate(table.schema)} for chunk in chunks
    ]


def save(columns: Mapping[str, Column], path: Path) -> None:
    """Write ``columns`` to ``path`` and make its folder; a crash leaves the previous file or the new one, never a part.

    Raises:
        BatchError: see `to_arrow`.
        DataError: ``path`` ends neither in .arrow nor in .parquet.
    """
    with reading(path):
        _check_suffix(path)
    table = to_arrow(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("xb") as file:
            if path.suffix == ".arrow":
                with pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
            else:
                # dictionaries would merge NaNs of different bits, and gain nothing on log-probs
                repeating = [field.name for field in table.schema if not pa.types.is_floating(_innermost(field.type))]
                pq.write_table(table, file, compression="zstd", use_dictionary=repeating, write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> list[dict[str, Column | Sequence[Any]]]:
    """Read what `save` wrote, as `from_arrow` does; see the module docstring for what is copied.

    Raises:
        DataError: the file is missing or was not written by `save`; `reading` names the file and catches damage.
    """
    _check_suffix(path)
    if not path.is_file():
        raise DataError("no such file")
    return from_arrow(_map_arrow(path) if path.suffix == ".arrow" else _read_parquet(path))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what fails inside into an error that names the file ``path``.

    Raises:
        DataError: the file is missing, damaged, or was not written by `save`.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (pa.ArrowException, OSError, ValueError) as error:  # a BatchError too: columns that do not fit together
        raise DataError(f"{path} is damaged, or not a {path.suffix} file: {error}") from error


def _map_arrow(path: Path) -> pa.Table:
    with path.open("rb") as file:
        # copy-on-write: an accidental write into a tensor stays in this process instead of killing it
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))).read_all()


def _read_parquet(path: Path) -> pa.Table:
    return pq.read_table(path, partitioning=None, page_checksum_verification=True)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".arrow", ".parquet"):
        raise DataError(f"a batch is saved as .arrow or .parquet, not {path.suffix or 'without an ending'}")


def _to_array(name: str, column: Column) -> tuple[pa.Array, dict[str, Any]]:
    if isinstance(column, Jagged):
        values = _tensor_to_array(name, column.values)
        array = pa.LargeListArray.from_arrays(pa.array(column.offsets.numpy()), values)
        return array, {"kind": "jagged", "dtype": dtype_name(column.values.dtype)}
    if isinstance(column, torch.Tensor):
        return _tensor_to_array(name, column), {"kind": "dense", "dtype": dtype_name(column.dtype)}
    if all(isinstance(value, str) and not value.startswith(_JSON) for value in column):
        try:
            return pa.array(column, pa.large_string()), {"kind": "objects"}
        except UnicodeEncodeError:  # lone surrogates; JSON escapes them
            pass
    try:
        texts = [_JSON + json.dumps(value) for value in column]
    except (TypeError, ValueError) as error:
        raise BatchError(f"column {name!r} holds objects that JSON cannot express: {error}") from error
    return pa.array(texts, pa.large_string()), {"kind": "objects"}


def _tensor_to_array(name: str, tensor: torch.Tensor) -> pa.Array:
    if 0 in tensor.shape[1:] or tensor.is_complex():
        raise BatchError(f"column {name!r} ({tensor.dtype} {list(tensor.shape)}) cannot be stored in Arrow")
    array = pa.array(to_numpy(tensor).reshape(-1))
    for size in reversed(tensor.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _from_array(array: pa.Array, field: pa.Field) -> Column | Sequence[Any]:
    about = json.loads((field.metadata or {}).get(_FIELD_KEY, b"{}"))
    if array.null_count or "kind" not in about:
        raise DataError(f"column {field.name!r} was not written by Batch")
    if about["kind"] == "objects":
        return [json.loads(text) if text.startswith(_JSON) else text for text in array.to_pylist()]
    dtype = getattr(torch, about["dtype"])
    if about["kind"] == "dense":
        return _tensor_from_array(array, dtype)
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    return Jagged(_tensor_from_array(array.flatten(), dtype), torch.from_numpy(lengths.astype(np.int64)))


def _tensor_from_array(array: pa.Array, dtype: torch.dtype) -> torch.Tensor:
    shape = [len(array)]
    while pa.types.is_fixed_size_list(array.type):
        shape.append(array.type.list_size)
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=not pa.types.is_boolean(array.type))
    return from_numpy(values, dtype).reshape(shape)


def _innermost(kind: pa.DataType) -> pa.DataType:
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return kind
