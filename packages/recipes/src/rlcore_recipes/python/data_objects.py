"""Data that is given as an object: what it is, and how it becomes a file that the recipes read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import ConfigError
from rlcore_recipes.python.argument import Argument

ACCEPTED = (
    "a datasets.Dataset, a list of dicts, a table (pyarrow, pandas …), a file or Hub name as in data.train_files, or a "
    "list of such names"
)


def data_argument(name: str, key: str, data: Any) -> Argument:
    """Return what ``data`` means, which is written as a file unless it names files.

    Args:
        name: of the argument, and of the file.
        key: the key of the configuration that names the files.

    Raises:
        ConfigError: it is nothing that can be read.
    """
    if isinstance(data, (str, os.PathLike)):
        data = [data]
    if isinstance(data, Mapping):
        raise ConfigError(f"{name}= is a {type(data).__name__} with the keys {_keys(data)}; give {_remedy(data)}")
    if isinstance(data, Sequence):
        names = [os.fspath(item) for item in data if isinstance(item, (str, os.PathLike))]
        if names and len(names) == len(data):
            return Argument(lambda folder: {key: names}, {})
        _check_rows(name, data)
        return _file(key, f"{name}.jsonl", lambda path: _write_rows(name, data, path))
    if _is(data, "datasets", "IterableDataset"):
        raise ConfigError(f"{name}= is a stream, whose number of rows is not known; name its files, or give a Dataset")
    if _is(data, "datasets", "Dataset"):
        return _file(key, f"{name}.parquet", lambda path: data.to_parquet(path))
    if _is(data, "pandas", "DataFrame") or hasattr(data, "__arrow_c_stream__"):
        return _file(key, f"{name}.parquet", lambda path: _write_table(data, path))
    raise ConfigError(f"{name}= must be {ACCEPTED}, not a {type(data).__name__}")


def _keys(data: Mapping[Any, Any]) -> str:
    more = ", …" if len(data) > 5 else ""
    return ", ".join(map(str, list(data)[:5])) + more


def _remedy(data: Mapping[Any, Any]) -> str:
    """Return what to give instead of a mapping, which may be of splits or of columns."""
    first, values = next(iter(data.items()), ("train", None))
    of_rows = (
        isinstance(values, Sequence) and not isinstance(values, str) and isinstance(next(iter(values), None), Mapping)
    )
    if hasattr(values, "column_names") or of_rows:
        return f"one split, such as …[{first!r}]"
    return "a table or a data set, such as datasets.Dataset.from_dict(…)"


def _file(key: str, file: str, write: Any) -> Argument:
    return Argument(lambda folder: {key: [str(folder / file)]}, {file: write})


def _is(value: object, library: str, kind: str) -> bool:
    """Return whether ``value`` is of a type of a library, which is imported if so."""
    module = sys.modules.get(library)
    return module is not None and isinstance(value, getattr(module, kind))


def _check_rows(name: str, rows: Sequence[Any]) -> None:
    if not rows:
        raise ConfigError(f"{name}= is empty")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ConfigError(f"{name}[{number}] is a {type(row).__name__}, not a dict of columns")


def _write_rows(name: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write ``rows`` as JSON: in Arrow, every dict would get the keys of all others."""
    with path.open("w", encoding="ascii") as file:
        for number, row in enumerate(rows):
            with boundary(
                f"{name}[{number}] cannot be written as JSON; give text, numbers, lists and dicts", ConfigError
            ):
                file.write(json.dumps(dict(row), default=_from_array) + "\n")


def _from_array(value: Any) -> Any:
    """Return the numbers of an array or a scalar, of numpy or torch."""
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is no value of JSON")


def _write_table(data: Any, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if _is(data, "pandas", "DataFrame"):
        named = any(name is not None for name in data.index.names)
        table = pa.Table.from_pandas(data, preserve_index=named)
    else:
        table = pa.table(data)
    pq.write_table(table, path)
