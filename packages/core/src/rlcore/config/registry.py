"""`Registry`: finds an algorithm by the name in a configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, Literal, TypeVar, get_args

from rlcore.config.base import Config
from rlcore.errors import BatchError, PluginError
from rlcore.plugins import import_algorithms

F = TypeVar("F", bound=Callable[..., object])

Trait = Literal[
    "compares_group",
    "compares_turns",
    "vanishes_with_advantage",
    "importance_ratio",
    "sequence_ratio",
    "imitates",
    "probability_labels",
    "mean_per_sequence",
]
"""Properties of a function that the rest of a run depends on:

- ``compares_group``: an advantage estimator whose baseline is computed from other samples of the same prompt;
- ``compares_turns``: one that compares the turns of trajectories, besides whole trajectories;
- ``vanishes_with_advantage``: a policy loss that is 0, with gradient 0, on a sequence whose advantages are all 0;
- ``importance_ratio``: a policy loss that weighs samples by π/π_old itself, or a correction that weighs by π/π_rollout;
- ``sequence_ratio``: a policy loss whose ratio is one per sequence, derived for means per sequence;
- ``imitates``: an advantage estimator whose advantages are given weights of samples, with which a loss without a ratio
  is supervised learning: exact whatever policy made the samples;
- ``probability_labels``: a loss of reward models whose labels are from 0 to 1;
- ``mean_per_sequence``: a loss aggregation that averages over the tokens of each sequence.
"""


class NoParams(Config):
    """For entries without parameters."""


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered function and what it declared.

    Attributes:
        required_columns: batch columns that the function reads in addition to those of its kind, with ``together``.
        traits: see `Trait`.
        together: the column of unit ids whose samples it compares (`rlcore.engines.ForwardRequest`), or None.
    """

    kind: str
    name: str
    function: F
    params: type[Config]
    required_columns: frozenset[str]
    traits: frozenset[Trait]
    together: str | None = None

    def check_columns(self, available: Collection[str]) -> None:
        """Check that a batch has the columns that the function declared.

        Args:
            available: names of the batch's columns.

        Raises:
            BatchError: a column is missing; the message names it.
        """
        missing = sorted(self.required_columns - set(available))
        if missing:
            raise BatchError(
                f"the {self.kind} {self.name!r} needs the column {missing[0]!r}, which is not in the batch; it has "
                f"{', '.join(sorted(available))}"
            )

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


_KINDS: dict[str, Registry[Any]] = {}


def registry_of_kind(kind: str) -> Registry[Any]:
    """Return the registry of ``kind``, such as "policy loss"."""
    return _KINDS[kind]


class Registry(Generic[F]):
    """Functions of one kind by name.

    Third parties add to it with `register`, in a module that is imported by their ``rlcore.algorithms`` entry point.

    Args:
        columns: functions of this kind get the batch columns that they declare with ``required_columns``.
        units: they may declare with ``together`` which samples they compare.
    """

    def __init__(self, kind: str, *, columns: bool = False, units: bool = False) -> None:
        self.kind = kind
        self._columns = columns
        self._units = units
        self._entries: dict[str, Entry[F]] = {}
        _KINDS[kind] = self

    def register(
        self,
        name: str,
        *,
        params: type[Config] = NoParams,
        required_columns: Set[str] = frozenset(),
        traits: Set[Trait] = frozenset(),
        together: str | None = None,
    ) -> Callable[[F], F]:
        """Add the decorated function.

        Args:
            params: the model of its parameters.
            required_columns: batch columns that it reads in addition to those of its kind: per token, dense, or of
                objects. A run whose recipe does not make one of them is refused.
            traits: see `Trait`.
            together: a dense column of unit ids, such as ``group``: samples with the same id are never divided.

        Raises:
            PluginError: another module has registered ``name``, a trait is unknown, or functions of this kind cannot
                have what is declared.
        """
        if (required_columns and not self._columns) or (together is not None and not self._units):
            raise PluginError(
                f"{self.kind} {name!r} declares {'required_columns' if required_columns else 'together'}, which "
                "functions of this kind do not get"
            )
        unknown = sorted(traits - set(get_args(Trait)))
        if unknown:
            raise PluginError(
                f"{self.kind} {name!r} has unknown traits: {', '.join(unknown)}; known: {', '.join(get_args(Trait))}"
            )

        columns = frozenset(required_columns) | ({together} if together is not None else frozenset())

        def add(function: F) -> F:
            if name in self._entries and self._entries[name].function.__module__ != function.__module__:
                raise PluginError(
                    f"{self.kind} {name!r} is already registered by {self._entries[name].function.__module__}; "
                    f"choose another name in {function.__module__}"
                )
            self._entries[name] = Entry(self.kind, name, function, params, columns, frozenset(traits), together)
            return function

        return add

    def get(self, name: str) -> Entry[F]:
        """Return the entry ``name``.

        Raises:
            PluginError: unknown, with close matches and the modules of algorithms that cannot be imported.
        """
        problems = import_algorithms()
        if name not in self._entries:
            close = get_close_matches(name[:100], self._entries, n=3)
            hint = (
                f"did you mean {' or '.join(map(repr, close))}?"
                if close
                else f"known: {', '.join(sorted(self._entries))}"
            )
            broken = "".join(f"; {problem}" for problem in problems)
            raise PluginError(f"unknown {self.kind} {name[:100]!r}; {hint}{broken}")
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry[F]]:
        import_algorithms()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))
