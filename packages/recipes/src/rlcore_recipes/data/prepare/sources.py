"""Finding the published files of a data set: in a folder, or on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlcore.errors import DataError
from rlcore.suggestions import similar_paths
from rlcore_recipes.data.arrow_data import dataset_rows, is_saved, open_hub
from rlcore_recipes.data.columns import Row
from rlcore_recipes.data.files import read_rows
from rlcore_recipes.data.text_files import JSON_LINES, text_format

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")


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


def all_splits(source: str, config: str | None = None) -> dict[str, Iterator[Row]]:
    """Return the rows of every split of a data set, as they are read.

    Args:
        source: a folder of data files (``train.jsonl``, ``test-00000-of-00002.parquet`` …) or of the library
            ``datasets``, one data file, or a Hub name.
        config: the Hub data set's configuration; in a folder, which of several folders has the files.

    Raises:
        DataError: as `read_split`.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if not _HUB_NAME.fullmatch(source) or source.startswith("."):
            raise DataError(f"the source {path} does not exist{similar_paths(path)}")
        splits = open_hub(source, config, None)
        return {str(name): _joined(dataset_rows(split, source)) for name, split in splits.items()}
    files: dict[str, list[Path]] = {}
    if path.is_file() or (path / "state.json").is_file():
        files = {_split_of(path): [path]}
    elif is_saved(path):
        files = {child.name: [child] for child in sorted(path.iterdir()) if is_saved(child)}
    else:
        for file in _one_folder(path, [file for file in sorted(path.rglob("*")) if _is_data(file)], config):
            files.setdefault(_split_of(file), []).append(file)
    if not files:
        raise DataError(f"the source folder {path} has no data files")
    return {split: _joined(map(read_rows, named)) for split, named in files.items()}


def _joined(chunks: Iterable[list[Row]]) -> Iterator[Row]:
    return (row for rows in chunks for row in rows)


def _is_data(file: Path) -> bool:
    known = file.suffix == ".parquet" or (text_format(file) is not None and file.name not in _ABOUT)
    return known and file.is_file()


def _split_of(file: Path) -> str:
    """Return the split that a file's name says: ``train`` of ``train-00000-of-00002.parquet``."""
    return _SHARD.sub("", file.name.partition(".")[0])


def _one_folder(folder: Path, files: list[Path], config: str | None) -> list[Path]:
    """Return those of ``files`` that are in ``folder``, or in one folder below it.

    Raises:
        DataError: they are in several folders, none of which has the name ``config`` or ``data``.
    """
    places = {file.parent for file in files}
    if folder in places:
        places = {folder}
    elif len(places) > 1:
        places = {place for place in places if place.name in (config, "data")}
    if files and len(places) != 1:
        found = ", ".join(str(file) for file in files[:5])
        raise DataError(f"{folder} has data files in several folders: {found}; name one of the folders")
    return [file for file in files if file.parent in places]


def split_files(folder: Path, split: str, config: str | None = None) -> list[Path]:
    """Return the data files of ``split`` in ``folder``: those in it, or else those at any depth.

    Raises:
        DataError: as `_one_folder`.
    """
    if is_saved(folder / split):
        return [folder / split]
    named = [f"{split}{ending}" for ending in (*JSON_LINES, ".parquet", ".json", ".csv")]
    for pattern in (*named, *(f"**/{name}" for name in named), f"**/{split}*.parquet"):
        if files := sorted(folder.glob(pattern)):
            return _one_folder(folder, files, config)
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
