"""Reading rows from Parquet, JSONL and Hub data sets."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID
from warnings import warn

from rlcore.boundary import boundary
from rlcore.config.values import is_url
from rlcore.errors import DataError, RlcoreWarning
from rlcore.suggestions import similar_paths
from rlcore_recipes.data.columns import Columns, Row, names_in
from rlcore_recipes.data.hub import go_offline_without_network
from rlcore_recipes.data.parquet import read_parquet

HUB = re.compile(r"hub:(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>.+))?")

LONGEST_LINE = 1 << 30
"""Bytes of the longest line that is read: a file without line breaks must not fill the memory."""


def read_rows(file: str | Path, default_split: str = "train") -> list[Row]:
    """Read all rows of a ``.parquet`` or ``.jsonl`` file, or of ``hub:org/name[:config][@split]``.

    Raises:
        DataError: missing, of another format, malformed (with line or column), or without rows.
    """
    return _read(str(file), Columns(), None, default_split)


def read_files(files: Sequence[str], columns: Columns, limit: int | None = None) -> Iterator[tuple[str, list[Row]]]:
    """Yield each file and its rows, until ``limit`` rows of all files together.

    Raises:
        DataError: as `read_rows`, or a column is missing.
    """
    for file in files:
        if limit is not None and limit <= 0:
            return
        rows = _read(file, columns, limit, "train")
        if limit is not None:
            limit -= len(rows)
        yield file, rows


def pads_with_nulls(file: str) -> bool:
    """Return whether a null in a struct may say that the field is absent: Arrow gives every struct all fields."""
    return not file.endswith((".jsonl", ".ndjson"))


def fingerprint(rows: Iterable[Row], file: str) -> str:
    """Return a hash of what the ``rows`` of ``file`` hold, to notice that it has changed."""
    digest = blake2b(digest_size=8)
    with boundary(f"{file} cannot be compared with what a checkpoint saw"):
        for row in rows:
            digest.update(json.dumps(row, default=_plain).encode() + b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> str:
    """Return what json.dumps writes for types that JSON lacks; their type alone where the text may hold an address."""
    known = isinstance(value, bytes | date | time | timedelta | Decimal | UUID)
    return f"{type(value).__name__} {value}" if known else type(value).__name__


def _read(file: str, columns: Columns, limit: int | None, default_split: str) -> list[Row]:
    if hub := HUB.fullmatch(file):
        rows = _checked(read_hub(hub["name"], hub["config"], hub["split"] or default_split)[:limit], columns, file)
    else:
        path = existing_file(file)
        if path.suffix == ".parquet":
            rows = read_parquet(path, columns, limit)
        elif path.suffix in (".jsonl", ".ndjson"):
            rows = _checked(_read_jsonl(path, limit), columns, file)
        else:
            raise DataError(f"data file {path} has the ending {path.suffix!r}; known are .parquet and .jsonl")
    if not rows:
        raise DataError(f"{file} has no rows")
    return rows


def _checked(rows: list[Row], columns: Columns, file: str) -> list[Row]:
    """``rows`` with the columns that are read alone, after a check that there are those that must be."""
    if not rows:
        return rows
    if columns.keys:
        columns.require(names_in(rows), file)
    return rows if columns.others else [{name: row[name] for name in columns.chosen(row)} for row in rows]


def existing_file(file: str) -> Path:
    """Return the path of a data file; it is a regular one, because a pipe or a device may never end.

    Raises:
        DataError: it is not there, or is something else.
    """
    with boundary(f"data file {file[:200]} cannot be read"):
        path = Path(file).expanduser()
        if path.is_file():
            return path
        if is_url(file):
            raise DataError(
                f"data file {file} is a URL; copy it to this machine, or name a data set of the Hub as hub:name"
            )
        if path.is_dir():
            what = "is a folder; name the files in it"
        else:
            what = "is not a regular file" if path.exists() else f"does not exist{similar_paths(path)}"
        raise DataError(f"data file {path} {what}")


def _read_jsonl(path: Path, limit: int | None) -> list[Row]:
    rows: list[Row] = []
    as_text = 0
    with boundary(f"data file {path} cannot be read"), path.open("rb") as lines:
        for number in count(1):
            line = lines.readline(LONGEST_LINE + 1)
            if not line or len(rows) == limit:
                break
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MiB; JSONL has one sample per line"
                )
            if not line.strip():
                continue
            try:
                row, unchanged = _parsed(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except Exception:
                with boundary(f"{path}, line {number} is not JSON in UTF-8"):
                    raise
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is a JSON {type(row).__name__}, not an object")
            rows.append(row)
            as_text += not unchanged
    if as_text:
        warn(
            f"{path}: integers of {as_text} lines have more digits than Python reads ({sys.get_int_max_str_digits()}) "
            "and are read as text",
            RlcoreWarning,
            stacklevel=2,
        )
    return rows


def _parsed(line: str) -> tuple[Any, bool]:
    """Return what the JSON ``line`` holds, and False if integers in it had to become text."""
    try:
        return json.loads(line), True
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of more digits than Python reads
        return json.loads(line, parse_int=_integer), False


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:
        return digits


def read_hub(name: str, config: str | None, split: str) -> list[Row]:
    """Read the rows of a Hub data set (needs the extra ``hub``)."""
    go_offline_without_network([name])  # before the import, by which the library reads whether it is offline
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise DataError(
            f"reading {name} from the Hub needs the package 'datasets'; run: pip install 'rlcore-recipes[hub]'"
        ) from error
    with boundary(f"split {split!r} of the Hub data set {name} cannot be loaded"):
        return load_dataset(name, config, split=split).to_list()  # type: ignore[no-any-return]
