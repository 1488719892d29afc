"""Rows of what the library `datasets` reads: its folders, Arrow files, and data sets of the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import DataError
from rlcore_recipes.data.columns import Row
from rlcore_recipes.data.hub import go_offline_without_network

CHUNK_ROWS = 1000


TOKENIZED = "tokenized.json"
"""The description in a folder of tokenised samples (`rlcore_recipes.data.tokenized`)."""


def is_tokenized(path: Path) -> bool:
    """Return whether ``path`` is a folder of tokenised samples."""
    return (path / TOKENIZED).is_file()


def is_saved(path: Path) -> bool:
    """Return whether ``path`` is a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def open_saved(path: Path) -> Any:
    """Open a folder of ``Dataset.save_to_disk``, or an ``.arrow`` file; the rows stay on disk.

    Raises:
        DataError: it is damaged, or a ``DatasetDict``, of which one split must be named.
    """
    from datasets import Dataset, DatasetDict, load_from_disk

    with boundary(f"{path} cannot be read by the library datasets"):
        found = Dataset.from_file(str(path)) if path.is_file() else load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        splits = [str(path / name) for name in found]
        raise DataError(f"{path} has several splits; name the folder of one of them: {', '.join(splits)}")
    return found


def open_hub(name: str, config: str | None, split: str | None) -> Any:
    """Open a split of a Hub data set, or all by name; the rows are in the library's cache on disk.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    go_offline_without_network([name])  # before the import, by which the library reads whether it is offline
    from datasets import load_dataset

    which = f"split {split!r} of the" if split else "the"
    with boundary(f"{which} Hub data set {name} cannot be loaded"):
        return load_dataset(name, config, split=split)


def dataset_rows(dataset: Any, where: str) -> Iterator[list[Row]]:
    """Yield the rows of a ``datasets.Dataset``, some at a time."""
    with boundary(f"{where} cannot be read by the library datasets"):
        tables = dataset.with_format("arrow")  # undecoded: images are refused, not opened
        for start in range(0, len(dataset), CHUNK_ROWS):
            yield tables[start : start + CHUNK_ROWS].to_pylist()
