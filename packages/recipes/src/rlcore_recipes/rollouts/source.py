"""The interface between a step and the source of its groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from rlcore.batch import Batch
from rlcore.controller import Pending
from rlcore_kit.checkpoint.json_file import JsonFile
from rlcore_recipes.rollouts.roll_out import Group

T = TypeVar("T")


@dataclass(frozen=True)
class Rollouts:
    """The samples that a step trains on.

    Attributes:
        batch: their trajectories (`group_batch`), those of a group next to each other.
        scores: the columns of `Scorer.score`, for the rows of ``batch``; they may still be computed.
        metrics: how the groups came about.
    """

    batch: Batch
    scores: Pending[Batch]
    metrics: dict[str, float] = field(default_factory=dict)


class GroupSource(Protocol):
    """Makes the groups that steps train on: `SynchronousGroups` or `AsynchronousGroups`.

    Its state is the position in the data.
    """

    @property
    def described_by(self) -> type[JsonFile]:
        """The model of `state`."""
        ...

    def take(self, step: int) -> Rollouts:
        """Return the samples that ``step`` trains on."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the position in the data, as JSON."""
        ...

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Continue from ``state``; before the first `take`."""
        ...

    def close(self) -> None:
        """Stop making groups."""
        ...


class Deferred(Generic[T]):
    """A `Pending` result that is computed when it is asked for."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._value: list[T] = []

    @property
    def done(self) -> bool:
        """Whether it was computed."""
        return bool(self._value)

    def result(self) -> T:
        """Return the result; compute it the first time."""
        if not self._value:
            self._value.append(self._compute())
        return self._value[0]


def joined(batches: Sequence[Batch]) -> Batch:
    """Return one batch with the rows of all ``batches``, which may be in worker processes."""
    return type(batches[0]).concat(batches)


def trajectories_of(groups: Sequence[Group]) -> Batch:
    """Return the trajectories of ``groups``, which all have run their episodes."""
    return joined([group.trajectories for group in groups if group.trajectories is not None])


def scores_of(groups: Sequence[Group]) -> Batch:
    """Return the scores of ``groups``, which all are scored."""
    return joined([group.scores for group in groups if group.scores is not None])
