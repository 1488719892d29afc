"""Entries of the table: what a key of verl is in rlcore's configuration.

Each key of verl has one `Key`, with the keys of rlcore that it sets and a conversion. A conversion returns the value of
the only key of rlcore, or a `Several`; it raises `NothingToSet` where rlcore does the same without a key, and
`NoEquivalent` where it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlcore_recipes.from_verl.view import VerlView

ANY = ".*"
"""End of the name of an entry for all keys below a section."""


class NoEquivalent(Exception):
    """rlcore has no such setting; the message says why, and what to do instead."""


class NothingToSet(NoEquivalent):
    """rlcore does the same without a key for it; the message says how."""


class Several(dict[str, Any]):
    """Values of several keys of rlcore."""


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET = _Unset()

Convert = Callable[[Any, VerlView], Any]


@dataclass(frozen=True, eq=False)
class Key:
    """One key of verl.

    Attributes:
        name: dotted; ending in ``.*`` for all keys below a section.
        ours: the keys of rlcore that it sets, alone or together with other keys of verl. ``*`` is the rest of the name.
        convert: from verl's value.
        default: verl's default, where other keys depend on it.
        written: verl's default differs from rlcore's and is written out.
        old: names that earlier or later versions of verl have for the same.
        meaning: the conversion in a few words, or the reason why there is no equivalent, for the documentation.
    """

    name: str
    ours: tuple[str, ...]
    convert: Convert
    default: Any = UNSET
    written: bool = False
    old: tuple[str, ...] = ()
    meaning: str = ""


def unchanged(value: Any, verl: VerlView) -> Any:
    """Return ``value``."""
    return value


def key(
    name: str,
    ours: str | tuple[str, ...],
    convert: Convert = unchanged,
    *,
    default: Any = UNSET,
    differs: Any = UNSET,
    old: tuple[str, ...] = (),
    meaning: str = "",
) -> Key:
    """Return the entry of a key with an equivalent.

    Args:
        default: verl's, which is rlcore's too.
        differs: verl's default that is not rlcore's; it is written out.
    """
    names = (ours,) if isinstance(ours, str) else ours
    written = differs is not UNSET
    return Key(name, names, convert, differs if written else default, written, old, meaning)


def without(
    name: str,
    reason: str,
    *,
    off: tuple[Any, ...] = (),
    switch: str | None = None,
    on: tuple[Any, ...] = (),
    old: tuple[str, ...] = (),
    default: Any = UNSET,
) -> Key:
    """Return the entry of a key without an equivalent; nothing is lost where verl does not use it either.

    Args:
        off: values besides null and empty ones with which verl does as rlcore.
        switch: a key of verl without which verl does not read this one.
        on: values of ``switch`` with which verl reads it; by default all but false, null, 0, ``disabled`` and empty
            ones.
    """

    def refuse(value: Any, verl: VerlView) -> Any:
        chosen = verl.get(switch) if switch else None
        if switch and not (chosen in on if on else chosen and chosen != "disabled"):
            raise NothingToSet(f"verl does not read it with {switch}={_shown(chosen)}")
        if value in (None, {}, []) or value in off:
            raise NothingToSet(f"with {_shown(value)} verl does not use it either")
        raise NoEquivalent(reason)

    return Key(name, (), refuse, default, old=old, meaning=reason)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value) or "an empty text"


def already(name: str, reason: str, *, old: tuple[str, ...] = (), default: Any = UNSET) -> Key:
    """Return the entry of a key for which there is nothing to set, whatever its value."""

    def agree(value: Any, verl: VerlView) -> Any:
        raise NothingToSet(reason)

    return Key(name, (), agree, default, old=old, meaning=f"nothing to set: {reason}")


def already_if(
    name: str, values: tuple[Any, ...], reason: str, otherwise: str, *, old: tuple[str, ...] = (), default: Any = UNSET
) -> Key:
    """Return the entry of a key for which there is nothing to set with one of ``values``, and no equivalent else."""

    def decide(value: Any, verl: VerlView) -> Any:
        raise NothingToSet(reason) if value in values else NoEquivalent(otherwise)

    shown = ", ".join(map(_shown, values))
    return Key(name, (), decide, default, old=old, meaning=f"{shown}: nothing to set, {reason}; else: {otherwise}")
