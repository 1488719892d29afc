"""What runs the engines: the interface that both executors offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rlcore.controller.pending import Pending

if TYPE_CHECKING:
    from rlcore.engines.settings import WeightSyncSettings
    from rlcore.metrics import Metrics

T = TypeVar("T")
Factory = Callable[[Mapping[str, Any]], Any]
"""Builds an engine, given the engines of the same process by role; picklable."""


@dataclass(frozen=True)
class Event:
    """What a process did, in seconds since the epoch.

    Attributes:
        name: of the call, such as "actor.train".
        label: the part of the step that it belongs to.
        worker: the process.
    """

    name: str
    label: str
    worker: str
    start: float
    end: float


class Executor(Protocol):
    """Builds engines where they belong and runs functions beside them; a recipe does not know which one it has.

    Functions are importable by name (they may be sent to other processes). A batch that a function is given or returns
    is a `Batch` inside of it; the caller may hold a `rlcore_ray.RemoteBatch` instead.
    """

    @property
    def overlaps(self) -> bool:
        """Whether calls on different engines can run at the same time."""
        ...

    def build(self, role: str, interface: type[T], factory: Factory) -> T:
        """The worker group of new engines, one in each process of the role's pool."""
        ...

    def apply(self, group: Any, function: Callable[..., T], *args: Any) -> list[T]:
        """``function(engine, *args)`` in every process of ``group``; the results by rank."""
        ...

    def one(self, group: Any, function: Callable[..., T], *args: Any) -> Pending[T]:
        """``function(engine, *args)`` in one process of ``group``."""
        ...

    def wait(self, pending: Sequence[Pending[Any]], timeout_s: float) -> list[Pending[Any]]:
        """Those of ``pending`` that are done, as soon as one is, or nothing after ``timeout_s`` seconds."""
        ...

    def stream(
        self, group: Any, function: Callable[..., Iterator[tuple[list[int], T]]], items: Sequence[Any], *args: Any
    ) -> Iterator[tuple[list[int], T]]:
        """``function(engine, items, *args)`` over the group's processes, each with its part of ``items``.

        The function yields results with the places, in the items that it was given, of those that they answer.
        """
        ...

    def compute(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` where the data is."""
        ...

    def sync_weights(self, trainer: Any, rollout: Any, version: int, settings: WeightSyncSettings) -> Metrics:
        """Make ``rollout`` generate with the weights of ``trainer`` and call them ``version``.

        Returns:
            what travelled between processes (`rlcore_kit.weight_transfer.TransferStats.metrics`), if anything did.
        """
        ...

    def on_replaced(self, catch_up: Callable[[], None] | None) -> None:
        """Have ``catch_up`` called, by whoever notices, when a rollout process was put in the place of a dead one.

        Such a process has the weights that it was built with. It is asked for nothing until `sync_weights` has given it
        those of the others, be it in ``catch_up`` or later. None: it is as good as the others.
        """
        ...

    def behind(self, group: Any) -> bool:
        """Whether a process of ``group`` waits for `sync_weights` because it was replaced."""
        ...

    def labelled(self, label: str) -> AbstractContextManager[None]:
        """Calls that this thread makes inside belong to the part ``label`` of the step."""
        ...

    def timeline(self) -> list[Event]:
        """What other processes did since the last call."""
        ...

    def barrier(self, name: str = "barrier") -> None:
        """Wait for all processes."""
        ...

    def close(self) -> None:
        """End what the executor started."""
        ...


def name_of(function: Callable[..., Any]) -> str:
    """What errors and the timeline call ``function``."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
