"""`Workers`: calls to worker processes, their load, and the replacement of those that die."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from warnings import warn

from rlcore.errors import RlcoreWarning, WorkerDied, WorkerError
from rlcore_ray.answers import PendingCall, Waiter
from rlcore_ray.calls import Call, cause_of_death
from rlcore_ray.pool import Pool

CLOSE_TIMEOUT_S = 3.0
"""For all engines together to close what they opened, before their processes are killed."""

MAX_REPLACEMENTS = 10
"""Give up on a process after this many deaths: the work itself probably kills it."""


class Workers:
    """The worker processes of an executor, in all of its pools.

    A rollout process that was replaced is *stale* until weights are synchronised: it has the weights that it was built
    with. Processes are named by pool and rank.

    Args:
        call_timeout_s: timeout of one call.

    Attributes:
        waiter: waits for the responses.
        catch_up: called after a rollout process was replaced; None if replacements need no weights.
    """

    def __init__(self, call_timeout_s: float) -> None:
        self.waiter = Waiter(call_timeout_s)
        self.catch_up: Callable[[], None] | None = None
        self._labels = threading.local()
        self._counting = threading.Lock()
        self._load = Counter[tuple[str, int]]()
        self._replacing = threading.RLock()  # held while processes are replaced, and while they are given weights
        self._replaced = Counter[tuple[str, int]]()
        self._stale: set[tuple[str, int]] = set()
        self._updated = threading.Condition()
        self._closing_since: float | None = None

    # --- calls -------------------------------------------------------------------------------------------------------

    def call(
        self,
        pool: Pool,
        rank: int,
        concurrency_group: str,
        name: str,
        work: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> PendingCall:
        """Start a call in one process, without waiting for it.

        Args:
            concurrency_group: see `rlcore_ray.worker.CONCURRENCY_GROUPS`.
        """
        worker = pool.workers[rank]
        call = Call(name, work, args, dict(kwargs or {}), self.label, self.waiter.timeout_s)
        response, body = getattr(worker, concurrency_group).remote(call)
        return PendingCall(name, pool, rank, worker, response, body)

    @property
    def label(self) -> str:
        """The part of the step that calls of this thread belong to."""
        return getattr(self._labels, "current", "")

    @contextmanager
    def trace_label(self, label: str) -> Iterator[None]:
        """Label the calls that this thread makes in the context."""
        before, self._labels.current = self.label, label
        try:
            yield
        finally:
            self._labels.current = before

    # --- load --------------------------------------------------------------------------------------------------------

    def least_loaded(self, pool: Pool, needs_weights: bool) -> int | None:
        """Return the rank with the fewest unfinished calls.

        Args:
            needs_weights: leave out stale processes; the result is None if all are.
        """
        with self._counting:
            ranks = [rank for rank in range(len(pool)) if not (needs_weights and (pool.name, rank) in self._stale)]
            return min(ranks, key=lambda rank: self._load[pool.name, rank], default=None)

    def add_load(self, pool: Pool, rank: int, change: int) -> None:
        """Change the number of unfinished calls of a process by ``change``."""
        with self._counting:
            self._load[pool.name, rank] += change

    # --- weights -----------------------------------------------------------------------------------------------------

    def has_stale(self, pool: Pool) -> bool:
        """Return whether a process of ``pool`` is stale."""
        return any(name == pool.name for name, _ in list(self._stale))

    def up_to_date(self, pool: Pool, role: str) -> list[int]:
        """Return the ranks of ``pool`` that are not stale; if all are, call `catch_up` first.

        Raises:
            WorkerError: all processes are still stale.
        """
        stale = self._stale if role == "rollout" else set()
        if self.catch_up is not None and all((pool.name, rank) in stale for rank in range(len(pool))):
            self.catch_up()
        ranks = [rank for rank in range(len(pool)) if (pool.name, rank) not in stale]
        if not ranks:
            raise WorkerError(f"all processes of the pool {pool.name!r} were replaced and have no current weights yet")
        return ranks

    @contextmanager
    def updating_weights(self, pool: Pool) -> Iterator[None]:
        """Keep other threads from replacing processes in the context; after it no process of ``pool`` is stale."""
        with self._replacing:
            yield
            with self._updated:
                self._stale -= {(pool.name, rank) for rank in range(len(pool))}
                self._updated.notify_all()

    def wait_updated(self, timeout_s: float) -> None:
        """Wait until no process is stale, or for ``timeout_s`` seconds."""
        with self._updated:
            self._updated.wait_for(lambda: not self._stale, timeout_s)

    # --- processes that die ------------------------------------------------------------------------------------------

    def replace(self, call: PendingCall, error: Exception, catch_up: bool = True) -> None:
        """Replace the process of ``call``, which died of ``error``, unless another thread already did.

        Args:
            catch_up: call `catch_up` afterwards, if the process is stale.

        Raises:
            WorkerDied: the processes of the pool are not replaceable, or this one died too often.
        """
        pool, rank, worker, title = call.pool, call.rank, call.worker, call.title
        with self._replacing:
            if pool.workers[rank] is not worker:
                return
            needs_weights = self.catch_up is not None and any(role == "rollout" for role, _ in pool.roles)
            while pool.workers[rank] is worker:
                self._replaced[pool.name, rank] += 1
                if pool.one_world or self._replaced[pool.name, rank] > MAX_REPLACEMENTS:
                    raise WorkerDied(f"{title} is gone: {cause_of_death(error)}") from error
                warn(f"{title} is gone ({cause_of_death(error)}); it is replaced", RlcoreWarning, stacklevel=2)
                if needs_weights:
                    self._stale.add((pool.name, rank))  # before another thread can call the new process
                try:
                    pool.replace(rank)
                except WorkerDied as again:
                    title, error = f"a new {pool.name}[{rank}]", again
            if needs_weights and catch_up and self.catch_up is not None:
                self.catch_up()

    def close_timeout_s(self) -> float:
        """Return how long to wait for the next engine to close: all of them together have `CLOSE_TIMEOUT_S`."""
        if self._closing_since is None:
            self._closing_since = time.monotonic()
        return max(self._closing_since + CLOSE_TIMEOUT_S - time.monotonic(), 0)
