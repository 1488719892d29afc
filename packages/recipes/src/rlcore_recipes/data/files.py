"""Reading rows from data files and Hub data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, time, timedelta
from decimal import Decimal
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from uuid import UUID

from rlcore.boundary import boundary
from rlcore.config.values import is_url
from rlcore.errors import DataError
from rlcore.suggestions import similar_paths
from rlcore_recipes.data.arrow_data import dataset_rows, is_saved, is_tokenized, open_hub, open_saved
from rlcore_recipes.data.columns import Columns, Row, names_in
from rlcore_recipes.data.layouts import Choose, every_column
from rlcore_recipes.data.media import refuse_media
from rlcore_recipes.data.parquet import read_parquet
from rlcore_recipes.data.text_files import COMPRESSIONS, JSON_LINES, TABLES, text_format, text_rows

HUB = re.compile(r"hub:(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>.+))?")


@dataclass(frozen=True)
class DataFile:
    """A data file.

    Attributes:
        name: as the user gave it.
        columns: those that are read.
        chunks: its rows in order, some at a time.
    """

    name: str
    columns: Columns
    chunks: Iterator[list[Row]]

    @property
    def padded(self) -> bool:
        """Whether a null in a struct may say that the field is absent: Arrow gives every struct all fields."""
        return HUB.fullmatch(self.name) is not None or text_format(Path(self.name)) is None


def read_rows(file: str | Path, default_split: str = "train") -> list[Row]:
    """Read all rows of a file, or of ``hub:org/name[:config][@split]``.

    Raises:
        DataError: as `open_file`.
    """
    return [row for rows in open_file(str(file), every_column, None, default_split).chunks for row in rows]


def open_files(files: Sequence[str], choose: Choose, limit: int | None = None) -> Iterator[DataFile]:
    """Yield each file, until ``limit`` rows of all files together were read of them.

    Raises:
        DataError: as `open_file`.
    """
    for file in files:
        if limit is None:
            yield open_file(file, choose)
        elif limit > 0:
            opened = open_file(file, choose, limit)
            chunks = list(opened.chunks)
            limit -= sum(map(len, chunks))
            yield replace(opened, chunks=iter(chunks))


class Fingerprint:
    """A hash of what the rows of a file hold, to notice that it has changed."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._digest = blake2b(digest_size=8)

    def add(self, rows: Iterable[Row]) -> None:
        """Go on with these rows."""
        with boundary(f"{self._file} cannot be compared with what a checkpoint saw"):
            for row in rows:
                self._digest.update(json.dumps(row, default=_plain).encode() + b"\n")

    def hex(self) -> str:
        """Return the hash of all rows so far."""
        return self._digest.hexdigest()


def _plain(value: object) -> str:
    """Return what json.dumps writes for types that JSON lacks; their type alone where the text may hold an address."""
    known = isinstance(value, bytes | date | time | timedelta | Decimal | UUID)
    return f"{type(value).__name__} {value}" if known else type(value).__name__


def open_file(file: str, choose: Choose, limit: int | None = None, default_split: str = "train") -> DataFile:
    """Open a data file and choose its columns.

    The columns of text files are those of the first 64 MiB.

    Raises:
        DataError: missing, of another format, malformed (with line or column), without rows or without a column.
    """
    if (hub := HUB.fullmatch(file)) is None and (path := existing_file(file)).suffix == ".parquet":
        columns, chunks = read_parquet(path, choose, limit)
    else:
        chunks = _limited(_other(file, hub, default_split), limit)
        first = next(chunks, [])
        columns = choose(names_in(first), file) if first else Columns()
        chunks = _chosen(chain([first], chunks), columns, file)
    first = next(chunks, [])
    if not first:
        raise DataError(f"{file} has no rows")
    return DataFile(file, columns, chain([first], chunks))


def _other(file: str, hub: re.Match[str] | None, default_split: str) -> Iterator[list[Row]]:
    """Return the rows of a file that is not Parquet."""
    if hub is not None:
        return dataset_rows(open_hub(hub["name"], hub["config"], hub["split"] or default_split), file)
    path = existing_file(file)
    if is_tokenized(path):
        raise DataError(f"{path} holds tokenised samples, which the recipe sft reads; name the data file itself")
    if path.suffix == ".arrow" or path.is_dir():
        return dataset_rows(open_saved(path), file)
    if text_format(path) is None:
        raise DataError(
            f"data file {path} has the ending {path.suffix!r}; known are .parquet, {', '.join(JSON_LINES)}, .json, "
            f"{', '.join(TABLES)} (also with {', '.join(COMPRESSIONS)}) and .arrow"
        )
    return text_rows(path)


def _limited(chunks: Iterator[list[Row]], limit: int | None) -> Iterator[list[Row]]:
    for rows in chunks:
        yield rows[:limit]
        if limit is not None:
            limit -= len(rows)
            if limit <= 0:
                return


def _chosen(chunks: Iterable[list[Row]], columns: Columns, file: str) -> Iterator[list[Row]]:
    """Yield the rows with the columns that are read alone."""
    read = 0
    for rows in chunks:
        refuse_media(rows, file, read)
        read += len(rows)
        yield rows if columns.others else [{name: row[name] for name in columns.chosen(row)} for row in rows]


def existing_file(file: str) -> Path:
    """Return the path of a data file: a regular one, as a pipe or a device may never end, or a folder of `datasets`.

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
            if is_saved(path) or is_tokenized(path):
                return path
            inside = [str(file) for file in sorted(path.iterdir()) if file.suffix == ".parquet" or text_format(file)]
            found = f": {', '.join(inside[:3])}{' …' * (len(inside) > 3)}" if inside else ""
            what = f"is a folder that Dataset.save_to_disk has not written; name the files in it{found}"
        else:
            what = "is not a regular file" if path.exists() else f"does not exist{similar_paths(path)}"
        raise DataError(f"data file {path} {what}")
