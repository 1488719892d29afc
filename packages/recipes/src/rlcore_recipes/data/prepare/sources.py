"""Finding the published files of a data set: in a folder, or on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from rlcore.errors import DataError
from rlcore_recipes.data.columns import Row
from rlcore_recipes.data.files import read_hub, read_rows

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_split(source: str, split: str, hub_config: str | None = None) -> list[Row]:
    """Read the rows of ``split`` as they were published.

    Args:
        source: a folder that holds ``<split>.jsonl``, ``<split>.parquet`` or ``<split>-*.parquet`` (at any depth, as in
            a copy of a Hub repository), or a Hub name ``org/name``.
        hub_config: the Hub data set's configuration.

    Raises:
        DataError: there is no such folder, file or Hub data set.
    """
    folder = Path(source)
    if not folder.exists():
        if _HUB_NAME.fullmatch(source) and not source.startswith("."):
            return read_hub(source, hub_config, split)
        raise DataError(f"the source folder {folder} does not exist")
    if not folder.is_dir():
        raise DataError(f"the source {folder} is a file; name the folder it is in")
    for pattern in (f"{split}.jsonl", f"{split}.parquet", f"**/{split}.jsonl", f"**/{split}*.parquet"):
        if files := sorted(folder.glob(pattern)):
            return [row for file in files for row in read_rows(file)]
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise DataError(f"the source folder {folder} has neither {split}.jsonl nor {split}.parquet, only {there}")


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
