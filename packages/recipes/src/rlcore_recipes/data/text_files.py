"""Rows of text files: JSON lines, JSON arrays and CSV, compressed or not."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any, cast
from warnings import warn

from rlcore.boundary import boundary
from rlcore.errors import DataError, RlcoreWarning
from rlcore_recipes.data.columns import Row

LONGEST_LINE = 1 << 30
"""Bytes of the longest line that is read: a file without line breaks must not fill the memory."""

CHUNK_BYTES = 64 << 20
"""Bytes of text, about, whose rows are handed on together."""

JSON_LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def text_format(path: Path) -> str | None:
    """Return the ending that says how to read a text file, that of a compression left out; None for other files."""
    ending = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    return ending if ending in (*JSON_LINES, ".json", *TABLES) else None


def text_rows(path: Path) -> Iterator[list[Row]]:
    """Yield the rows of a text file, some at a time.

    Raises:
        DataError: it cannot be read; names the line, or the number of the item in a JSON array.
    """
    ending = text_format(path)
    with boundary(f"data file {path} cannot be read"):
        if ending in TABLES:
            yield from _csv(path, TABLES[ending])
        elif ending == ".json" and _is_array(path):
            yield from _array(path)
        else:
            yield from _lines(path)


def _opened(path: Path) -> IO[bytes]:
    if path.suffix not in COMPRESSIONS:
        return path.open("rb")
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    method = infer_compression(path.name)
    if method not in compr:
        raise DataError(f"data file {path} is compressed in a way that nothing installed reads; decompress it")
    return cast(IO[bytes], compr[method](path.open("rb"), mode="rb"))


def _lines(path: Path) -> Iterator[list[Row]]:
    rows: list[Row] = []
    size = as_text = 0
    with _opened(path) as lines:
        for number in count(1):
            line = lines.readline(LONGEST_LINE + 1)
            if not line:
                break
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MiB; JSONL has one sample per line"
                )
            if not line.strip():
                continue
            row, unchanged = _parsed(line, f"{path}, line {number}", number == 1)
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is a JSON {type(row).__name__}, not an object")
            rows.append(row)
            as_text += not unchanged
            size += len(line)
            if size >= CHUNK_BYTES:
                yield rows
                rows, size = [], 0
    if rows:
        yield rows
    _warn_of_digits(path, as_text, "lines")


def _is_array(path: Path) -> bool:
    with _opened(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array(path: Path) -> Iterator[list[Row]]:
    with _opened(path) as file:
        content = file.read(LONGEST_LINE + 1)
    if len(content) > LONGEST_LINE:
        raise DataError(f"{path} is a JSON array of more than {LONGEST_LINE >> 20} MiB; write it as JSONL")
    rows, unchanged = _parsed(content, str(path), first=True)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: item {number} of the array is a JSON {type(row).__name__}, not an object")
    if rows:
        yield rows
    _warn_of_digits(path, not unchanged, "rows")


def _parsed(text: bytes, where: str, first: bool) -> tuple[Any, bool]:
    """Return what JSON ``text`` holds, and False if integers in it had to become text."""
    try:
        decoded = text.decode("utf-8-sig" if first else "utf-8")
        try:
            return json.loads(decoded), True
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than Python reads
            return json.loads(decoded, parse_int=_integer), False
    except Exception:
        with boundary(f"{where} is not JSON in UTF-8"):
            raise


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:
        return digits


def _warn_of_digits(path: Path, number: int, what: str) -> None:
    if number:
        warn(
            f"{path}: integers of {number} {what} have more digits than Python reads ({sys.get_int_max_str_digits()}) "
            "and are read as text",
            RlcoreWarning,
            stacklevel=2,
        )


def _csv(path: Path, delimiter: str) -> Iterator[list[Row]]:
    """Yield rows, whose values are text; numbers and truth values where a whole column is written as Python does."""
    kinds: dict[str, set[type]] = {}
    for _, row in _cells(path, delimiter):
        for name, cell in row.items():
            if cell:
                kinds.setdefault(name, set()).add(_kind(cell))
    types = {name: _common(found) for name, found in kinds.items()}
    rows: list[Row] = []
    size = 0
    for length, row in _cells(path, delimiter):
        rows.append({name: _value(types[name], cell) if cell else None for name, cell in row.items()})
        size += length
        if size >= CHUNK_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the length of each row and its cells by column."""
    csv.field_size_limit(LONGEST_LINE)
    with _opened(path) as file, io.TextIOWrapper(cast(Any, file), "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        with boundary(f"{path}, line 1 cannot be read"):
            header = next(reader, [])
        if len(header) > len(set(header)):
            raise DataError(f"{path} has more than one column of the same name: {', '.join(header)}")
        while True:
            with boundary(f"{path}, line {reader.line_num + 1} cannot be read"):
                cells = next(reader, None)
            if cells is None:
                return
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num} has {len(cells)} cells, and the first line names {len(header)} "
                    "columns; put text with commas or line breaks in double quotes"
                )
            if cells:
                yield sum(map(len, cells)), dict(zip(header, cells))


def _kind(cell: str) -> type:
    """Return the type whose value Python writes as ``cell``: nothing of the text is lost by it."""
    if cell in ("True", "False"):
        return bool
    if len(cell) > 30 or not (cell[0] in "-." or cell[0].isdigit()):
        return str
    for number in (int, float):
        try:
            if str(number(cell)) == cell:
                return number
        except ValueError:
            continue
    return str


def _common(kinds: set[type]) -> type:
    return next(iter(kinds)) if len(kinds) == 1 else float if kinds == {int, float} else str


def _value(kind: type, cell: str) -> Any:
    return cell == "True" if kind is bool else kind(cell)
