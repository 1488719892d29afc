"""What an unknown key or value might have been, searched for in the whole tree of keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from rlcore.config.base import LONGEST_NAME, Config
from rlcore.config.keys import Key, sections
from rlcore.config.yaml_format import KeyPath

_MOST = 3
_DEEPEST = 20
_CLOSE_ANYWHERE = 0.8  # elsewhere in the tree, where there are many names, than among the neighbours


class Hints:
    """Suggestions for the keys and values of ``model``; the tree is walked when the first one is asked for."""

    def __init__(self, model: type[Config]) -> None:
        self._model = model

    @cached_property
    def _keys(self) -> dict[str, Key | None]:
        """Every dotted key, sections (None) included."""
        found: dict[str, Key | None] = {}
        for section in sections(self._model):
            if section.path:
                found.setdefault(section.path, None)
            for key in section.keys:
                found[f"{section.path}.{key.name}" if section.path else key.name] = key
        return found

    def key(self, path: KeyPath, siblings: Sequence[str], value: Any = None) -> str:
        """Return the key that the unknown ``path`` might have been.

        That is the key for what another framework calls so, and a key of the same name; or else a similar one in the
        same section, or else anywhere. Without any, all keys of the section are named.

        Args:
            value: the value given; a mapping may be a section of another framework's.
        """
        name, place = str(path[-1])[:LONGEST_NAME], [str(item) for item in path[:-1]]
        found = self._ranked(place, {name})
        foreign = [text for leaf in _leaves(path, value) for text in self._foreign(leaf)]
        if foreign:
            more = [f"and {len(foreign) - _MOST} more"] if len(foreign) > _MOST else []
            return "; ".join([*foreign[:_MOST], *more]) + (f"; or did you mean {' or '.join(found)}?" if found else "")
        if not found:
            found = [".".join([*place, close]) for close in get_close_matches(name, siblings, n=_MOST)]
        if not found:
            names = {key.rpartition(".")[2] for key in self._keys}
            found = self._ranked(place, set(get_close_matches(name, names, n=_MOST, cutoff=_CLOSE_ANYWHERE)))
        if found:
            return f"did you mean {' or '.join(found)}?"
        return f"known here: {', '.join(siblings) or 'none'}"

    def _foreign(self, path: KeyPath) -> list[str]:
        """Return what other frameworks' key ``path`` is here, or else in other recipes."""
        here, elsewhere = [], []
        for key in self._model.foreign_keys(".".join(map(str, path))):
            ours, theirs = [name for name in key.ours if name in self._keys], f"{key.framework}'s {key.name}"
            if ours:
                here.append(f"{theirs} is {', '.join(ours)}" + (f" ({key.remark})" if key.remark else ""))
            elif key.ours:
                elsewhere.append(f"{theirs} is {', '.join(key.ours)}, which this recipe does not have")
            else:
                here.append(f"{theirs} has no key here: {key.remark}")
        return here or elsewhere

    def _ranked(self, place: Sequence[str], names: set[str]) -> list[str]:
        """Return other keys with one of ``names``, those close to ``place`` and to the top of the tree first.

        A key in ``place`` itself, unknown there although it is in the tree, is a parameter of another algorithm.
        """

        def distance(key: str) -> tuple[int, int]:
            parts = key.split(".")
            shared = next((i for i, (one, other) in enumerate(zip(parts, place)) if one != other), len(place))
            return -shared, len(parts)

        here = ".".join(place)
        found = (key for key in self._keys if key.rpartition(".")[2] in names and key.rpartition(".")[0] != here)
        return sorted(found, key=distance)[:_MOST]

    def value(self, path: KeyPath, value: str) -> str | None:
        """Return a hint for the unknown name ``value``: other keys that take it, or similar names of this key."""
        dotted = ".".join(map(str, path))
        own = self._keys.get(dotted)
        if own is not None and value in own.options:  # an installed plugin that does not work
            return None
        elsewhere = [key for key, known in self._keys.items() if known and value in known.options and key != dotted]
        if elsewhere:
            return f"{value} is a value of {', '.join(elsewhere[:_MOST])}"
        close = get_close_matches(value[:LONGEST_NAME], own.options if own is not None else (), n=_MOST)
        return f"did you mean {' or '.join(close)}?" if close else None


def _leaves(path: KeyPath, value: Any) -> Iterator[KeyPath]:
    """Yield ``path``, or those of all values below it if ``value`` is a mapping."""
    if isinstance(value, Mapping) and value and len(path) < _DEEPEST:
        for name, inner in value.items():
            yield from _leaves((*path, str(name)[:LONGEST_NAME]), inner)
    else:
        yield path
