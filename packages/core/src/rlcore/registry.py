"""Named, typed choices: how an algorithm is found by the name in a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from rlcore.config.base import Config
from rlcore.errors import PluginError

F = TypeVar("F", bound=Callable[..., object])


class NoParams(Config):
    """For entries without parameters."""


@dataclass(frozen=True)
class Entry(Generic[F]):
    """``needs``: batch columns the function reads besides the obvious ones; ``summary``: first docstring line."""

    kind: str
    name: str
    function: F
    params: type[Config]
    needs: frozenset[str]

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").strip().split("\n")[0]


_KINDS: dict[str, Registry[Any]] = {}


def registry_of_kind(kind: str) -> Registry[Any]:
    return _KINDS[kind]


class Registry(Generic[F]):
    """Functions of one kind by name.

    Third parties add to it with `register`, in a module that is imported by their ``rlcore.algorithms`` entry point.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[F]] = {}
        _KINDS[kind] = self

    def register(
        self, name: str, *, params: type[Config] = NoParams, needs: frozenset[str] | set[str] = frozenset()
    ) -> Callable[[F], F]:
        def add(function: F) -> F:
            if name in self._entries and self._entries[name].function.__module__ != function.__module__:
                raise PluginError(
                    f"{self.kind} {name!r} is registered by {self._entries[name].function.__module__} already; "
                    f"choose another name in {function.__module__}"
                )
            self._entries[name] = Entry(self.kind, name, function, params, frozenset(needs))
            return function

        return add

    def get(self, name: str) -> Entry[F]:
        self._load()
        if name not in self._entries:
            close = get_close_matches(name, self._entries, n=3)
            hint = (
                f"did you mean {' or '.join(map(repr, close))}?"
                if close
                else f"known: {', '.join(sorted(self._entries))}"
            )
            raise PluginError(f"unknown {self.kind} {name!r}; {hint}")
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry[F]]:
        self._load()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    @staticmethod
    def _load() -> None:
        from rlcore.plugins import import_algorithms

        import_algorithms()
