"""Reading rows from Parquet, JSONL and Hub data sets, and columns from rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rlcore.errors import DataError

Row = dict[str, Any]

HUB = re.compile(r"hub:(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>.+))?")


def read_rows(file: str | Path, default_split: str = "train") -> list[Row]:
    """All rows of a ``.parquet`` or ``.jsonl`` file, or of ``hub:org/name[:config][@split]``.

    Raises:
        DataError: missing, of another format, malformed (with the line), or without rows.
    """
    if hub := HUB.fullmatch(str(file)):
        rows = read_hub(hub["name"], hub["config"], hub["split"] or default_split)
    else:
        rows = _read_file(Path(file).expanduser())
    if not rows:
        raise DataError(f"{file} has no rows")
    return rows


def read_files(files: Sequence[str], limit: int | None = None) -> Iterator[tuple[str, list[Row]]]:
    """Each file and its rows, until ``limit`` rows of all files together."""
    for file in files:
        if limit is not None and limit <= 0:
            return
        rows = read_rows(file)[:limit]
        if limit is not None:
            limit -= len(rows)
        yield file, rows


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        what = "is a folder; name the files in it" if path.is_dir() else "does not exist"
        nearby = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, nearby, n=3)
        raise DataError(f"data file {path} {what}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return list(_read_jsonl(path))
    raise DataError(f"data file {path} has the ending {path.suffix!r}; known are .parquet and .jsonl")


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is a JSON {type(row).__name__}, not an object")
            yield row


def read_hub(name: str, config: str | None, split: str) -> list[Row]:
    """The rows of a Hub data set (needs the extra ``hub``)."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise DataError(
            f"reading {name} from the Hub needs the package 'datasets'; run: pip install 'rlcore-recipes[hub]'"
        ) from error
    try:
        return load_dataset(name, config, split=split).to_list()  # type: ignore[no-any-return]
    except Exception as error:  # the library raises anything from ConnectionError to ValueError
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"split {split!r} of the Hub data set {name} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error


def column(row: Row, key: str) -> Any:
    """The value of column ``key``, None if the row lacks it.

    Dots reach into structs, unless a column has the dotted name itself.
    """
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def require_columns(rows: list[Row], keys: Mapping[str, str | None], file: str) -> None:
    """Check that the columns exist.

    Args:
        keys: column by the setting that names it; null ones are not needed.

    Raises:
        DataError: names the setting, the missing column and those there are.
    """
    columns = list(dict.fromkeys(name for row in rows for name in _names(row)))
    for setting, key in keys.items():
        if key is None or key in columns:
            continue
        alike = [name for name in columns if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        close = alike or get_close_matches(key, columns, n=1)
        hint = f"did you mean {setting}={close[0]}?" if close else f"set {setting}"
        raise DataError(f"{file} has no column {key!r}, only {', '.join(columns)}; {hint}")


def _names(row: Row, prefix: str = "") -> Iterator[str]:
    for name, value in row.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")
