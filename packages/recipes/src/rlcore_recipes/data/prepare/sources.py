"""Finding the published files of a data set: in a folder, or on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from rlcore.errors import DataError
from rlcore_recipes.data.arrow_data import dataset_rows, is_saved, open_hub
from rlcore_recipes.data.columns import Row
from rlcore_recipes.data.files import read_rows
from rlcore_recipes.data.text_files import JSON_LINES

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_split(source: str, split: str, hub_config: str | None = None) -> list[Row]:
    """Read the rows of ``split`` as they were published.

    Args:
        source: a folder that holds ``<split>.jsonl`` or another data file of that name, or ``<split>-*.parquet`` (at
            any depth, as in a copy of a Hub repository), or a Hub name ``org/name``.
        hub_config: the Hub data set's configuration; in a folder, which of several folders has the files.

    Raises:
        DataError: there is no such folder, file or Hub data set, or there are several.
    """
    folder = Path(source)
    if not folder.exists():
        if _HUB_NAME.fullmatch(source) and not source.startswith("."):
            return [row for rows in dataset_rows(open_hub(source, hub_config, split), source) for row in rows]
        raise DataError(f"the source folder {folder} does not exist")
    if not folder.is_dir():
        raise DataError(f"the source {folder} is a file; name the folder it is in")
    files = split_files(folder, split, hub_config)
    if not files:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise DataError(f"the source folder {folder} has neither {split}.jsonl nor {split}.parquet, only {there}")
    return [row for file in files for row in read_rows(file)]


def split_files(folder: Path, split: str, config: str | None = None) -> list[Path]:
    """Return the data files of ``split`` in ``folder``: those in it, or else those at any depth.

    Raises:
        DataError: they are in several folders, none of which has the name ``config`` or ``data``.
    """
    if is_saved(folder / split):
        return [folder / split]
    named = [f"{split}{ending}" for ending in (*JSON_LINES, ".parquet", ".json", ".csv")]
    for pattern in (*named, *(f"**/{name}" for name in named), f"**/{split}*.parquet"):
        files = sorted(folder.glob(pattern))
        places = {file.parent for file in files}
        if len(places) > 1:
            places = {place for place in places if place.name in (config, "data")}
            if len(places) != 1:
                found = ", ".join(str(file) for file in files[:5])
                raise DataError(f"{folder} has several files for the split {split}: {found}; name one of their folders")
        if files:
            return [file for file in files if file.parent in places]
    return []


def field(row: Row, name: str, source: str, number: int) -> str:
    """Return the text in field ``name`` of a published row.

    Raises:
        DataError: the row has none.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(
            f"{source}, row {number}: field {name!r} must be text, not {value!r}; the row has {', '.join(row)}"
        )
    return value
