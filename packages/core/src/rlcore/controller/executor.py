"""`Executor`: builds the engines of a run in its processes and calls functions there."""

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
    """A call that a worker process worked on, in seconds since the epoch.

    Attributes:
        name: of the call, such as "actor.train".
        label: the part of the step that the call belongs to (`Executor.trace_label`).
        worker: the process.
    """

    name: str
    label: str
    worker: str
    start: float
    end: float


class Executor(Protocol):
    """Builds engines in worker processes and calls functions in the processes of an engine.

    Recipes use this interface alone, so the same recipe runs in one process, under ``torchrun`` and on a cluster. The
    argument ``workers`` of a method is what `build` returned: the processes of one role.

    Functions are importable by name, because they may be sent to other processes. A function takes and returns `Batch`;
    its caller may hold a batch by reference (such as `rlcore_ray.RemoteBatch`) instead.
    """

    @property
    def overlaps(self) -> bool:
        """Whether calls on different engines can run at the same time."""
        ...

    def build(self, role: str, interface: type[T], factory: Factory) -> T:
        """Build an engine in each process of the role's pool.

        Returns:
            the workers of the role, called as if they were one engine: methods are spread over the processes as
            ``interface`` declares (`rlcore.controller.dispatch`).
        """
        ...

    def apply(self, workers: Any, function: Callable[..., T], *args: Any) -> list[T]:
        """Call ``function(engine, *args)`` in every process of ``workers`` and return the results by rank."""
        ...

    def submit(self, workers: Any, function: Callable[..., T], *args: Any) -> Pending[T]:
        """Start ``function(engine, *args)`` in one process of ``workers``; ``function`` may be a coroutine function.

        A replaceable process that dies meanwhile is replaced and the call is repeated, by the same or another process.
        """
        ...

    def wait_any(self, pending: Sequence[Pending[Any]], timeout_s: float) -> list[Pending[Any]]:
        """Wait until at least one of ``pending`` is done and return all that are; none after ``timeout_s`` seconds."""
        ...

    def stream(
        self, workers: Any, function: Callable[..., Iterator[tuple[list[int], T]]], items: Sequence[Any], *args: Any
    ) -> Iterator[tuple[list[int], T]]:
        """Divide ``items`` over the processes of ``workers`` and yield what ``function(engine, part, *args)`` yields.

        The function yields pairs of indices into the part that it was given, and the result for those items; `stream`
        yields the same pairs with indices into ``items``. Results come in any order, each item exactly once.
        """
        ...

    def compute(self, function: Callable[..., T], *args: Any) -> T:
        """Call ``function(*args)`` in a process that can read the batches among ``args``."""
        ...

    def sync_weights(self, trainer: Any, rollout: Any, version: int, settings: WeightSyncSettings) -> Metrics:
        """Make ``rollout`` generate with the weights of ``trainer`` and label them ``version``.

        Args:
            trainer, rollout: workers of a `TrainEngine` and of a `RolloutEngine`.

        Returns:
            metrics of the transfer between processes (`rlcore_kit.weight_transfer.TransferStats.metrics`); none if
            both are in the same processes.
        """
        ...

    def on_worker_replaced(self, catch_up: Callable[[], None] | None) -> None:
        """Register ``catch_up``, which is called when a dead rollout process was replaced, in the thread that noticed.

        The new process has the weights that it was built with. No requests are routed to it until `sync_weights` has
        updated it (in ``catch_up`` or later). Pass None if replacements need no weights.
        """
        ...

    def has_stale_workers(self, workers: Any) -> bool:
        """Return whether a process of ``workers`` was replaced and has not been updated by `sync_weights` since."""
        ...

    def trace_label(self, label: str) -> AbstractContextManager[None]:
        """Label the calls that this thread makes in the context with the part ``label`` of the step (`timeline`)."""
        ...

    def timeline(self) -> list[Event]:
        """Return the calls that other processes finished since the last call of `timeline`."""
        ...

    def barrier(self, name: str = "barrier") -> None:
        """Wait until all processes are done with the calls so far."""
        ...

    def close(self) -> None:
        """End the processes that the executor started."""
        ...


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of ``function`` in errors and in the timeline."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
