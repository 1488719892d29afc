"""What a user may have meant by a name that is not there."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from types import ModuleType

_LOOKED_AT = 10_000  # entries of a folder
_NAMED = 20


def similar_paths(path: Path) -> str:
    """Return "; did you mean …?" with entries of the folder where ``path`` ends to exist; empty if none is similar."""
    for name, parent in zip((path.name, *(folder.name for folder in path.parents)), path.parents):
        try:
            entries = [entry.name for entry in islice(parent.iterdir(), _LOOKED_AT)]
        except OSError:
            continue
        found = [str(parent / close) for close in get_close_matches(name, entries, n=3)]
        return f"; did you mean {' or '.join(found)}?" if found else ""
    return ""


def definitions_of(module: ModuleType) -> str:
    """Return "; it has …" with the functions and classes that ``module`` defines."""
    names = [
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__
    ]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"; it has {', '.join(names[:_NAMED])}{more}" if names else "; it has no functions or classes"
