"""Images, audio and video in data files: refused, since models here read text alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlcore.errors import DataError

COLUMNS = ("images", "videos", "audios")
"""Names of columns that hold media in verl's files, as whatever."""

ENCODED = ({"bytes", "path"}, {"array", "sampling_rate"})
"""Fields of structs in which the library `datasets` keeps images and audio."""


def refuse_media(rows: Iterable[Mapping[str, Any]], file: str, first: int = 0) -> None:
    """Make sure that no column of ``rows`` holds images, audio or video.

    Args:
        first: number of the first row.

    Raises:
        DataError: names row and column.
    """
    for number, row in enumerate(rows, first):
        for name, value in row.items():
            if _is_media(value, name):
                raise DataError(
                    f"{file}, row {number}: column {name!r} holds images, audio or video, and only text models are "
                    "supported; use data without them (to train on the text alone, remove the column)"
                )


def may_be_media(name: str, fields: Sequence[str]) -> bool:
    """Return whether a column may hold media.

    Args:
        fields: names of all fields in it, at any depth.
    """
    return name in COLUMNS or any(fields_of <= {*fields} for fields_of in ENCODED)


def _is_media(value: Any, name: str) -> bool:
    if isinstance(value, list):
        return bool(value) and (name in COLUMNS or _is_media(value[0], ""))
    if isinstance(value, dict):
        return any(fields <= value.keys() for fields in ENCODED)
    if name in COLUMNS and value is not None and value != "":
        return True
    return type(value).__module__.partition(".")[0] in ("PIL", "torchcodec")
