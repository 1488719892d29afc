"""Columns of rows: which are read, and their values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from rlcore.errors import DataError

Row = dict[str, Any]

FOREIGN = {
    "instruction": ("Alpaca's", "{key}=instruction data.apply_chat_template=always"),
    "input": ("OpenRLHF's", "{key}=input"),
    "context_messages": ("OpenRLHF's", "{key}=context_messages"),
    "question": ("verifiers'", "{key}=question data.apply_chat_template=always"),
    "problem": ("MATH's", "{key}=problem data.apply_chat_template=always"),
    "messages": ("a conversation in", "{key}=messages if its last turn is the user's"),
    "conversations": ("ShareGPT's", "{key}=conversations after renaming 'from' and 'value' to 'role' and 'content'"),
}
"""Names of prompt columns in data sets made for others: where they come from, and the setting that reads them."""


@dataclass(frozen=True)
class Columns:
    """The columns that are read of a file.

    Attributes:
        keys: column by the setting that names it; null ones are not needed. Dots reach into structs.
        others: whether the columns that no setting names are read too.
        same: columns that must hold the same as that of the ground truth.
        notes: what was recognised, for the user.
    """

    keys: Mapping[str, str | None] = field(default_factory=dict)
    others: bool = True
    same: Sequence[str] = ()
    notes: Sequence[str] = ()

    def require(self, names: Sequence[str], file: str) -> None:
        """Check that the columns exist.

        Args:
            names: of the file's columns, and of the fields of structs with dots.

        Raises:
            DataError: names the setting, the missing column and those there are.
        """
        for setting, key in self.keys.items():
            if key is None or key in names:
                continue
            alike = [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
            close = alike or get_close_matches(key, names, n=1)
            foreign = next((name for name in FOREIGN if name in names), None)
            if close:
                hint = f"did you mean {setting}={close[0]}?"
            elif foreign and setting == "data.prompt_key":
                origin, remedy = FOREIGN[foreign]
                hint = f"it has {origin} {foreign!r}: set {remedy.format(key=setting)}"
            else:
                hint = f"set {setting}"
            raise DataError(f"{file} has no column {key!r}, only {', '.join(names)}; {hint}")

    def chosen(self, columns: Iterable[str]) -> list[str]:
        """Return the columns among ``columns`` of a file that are read."""
        named = [key for key in self.keys.values() if key is not None]
        return [name for name in columns if self.others or any(_reaches(key, name) for key in named)]


def column(row: Row, key: str) -> Any:
    """Return the value of column ``key``, None if the row lacks it.

    Dots reach into structs, unless a column has the dotted name itself.
    """
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def number(row: Row, key: str, where: str) -> float:
    """Return the number in column ``key``.

    Raises:
        DataError: it holds something else; ``where`` names file and row.
    """
    value = column(row, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: column {key!r} must hold a finite number, not {value!r:.100}")
    return float(value)


def data_source(row: Row, key: str | None, file: str, default: str) -> str:
    """Return the name of the row's data set: that in column ``key``, or ``default`` without a key.

    Raises:
        DataError: the column holds no name; ``file`` names file and row.
    """
    if key is None:
        return default
    value = column(row, key)
    is_name = isinstance(value, str | int) and not isinstance(value, bool)
    if not is_name or not str(value) or not str(value).isprintable():  # metrics are named after it
        raise DataError(
            f"{file}: column {key!r} must name the data set, not be {value!r:.100}; fill it in, or set "
            "data.data_source_key to another column or to null (the file's name)"
        )
    return str(value)


def names_in(rows: Iterable[Row]) -> list[str]:
    """Return names of the columns of ``rows``, and of the fields of structs with dots."""
    return list(dict.fromkeys(name for row in rows for name in _names(row)))


def _names(row: Row, prefix: str = "") -> Iterator[str]:
    for name, value in row.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")


def _reaches(key: str, column: str) -> bool:
    return key == column or key.startswith(f"{column}.")
