"""Results of calls to one process of a pool, whichever it is: if that process dies, another one is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray

from rlcore.controller.pending import Pending
from rlcore.errors import WorkerError
from rlcore_ray.answers import Asked, Ref, read
from rlcore_ray.calls import Head, unpacked
from rlcore_ray.pool import Pool

if TYPE_CHECKING:
    from rlcore_ray.executor import RayExecutor

T = TypeVar("T")

LOOK_S = 10.0
"""Longest wait inside of Ray; then whoever waits looks at the time."""


class Remote(Generic[T]):
    """A `Pending` result of one call to the process of a pool with the least to do.

    Used by one thread at a time. It reads as what it waits for: ``str(remote)``.

    Args:
        weights: only processes that have the current weights are asked.
    """

    def __init__(
        self,
        executor: RayExecutor,
        pool: Pool,
        name: str,
        work: Callable[..., Any],
        args: tuple[Any, ...],
        weights: bool = False,
    ) -> None:
        self._executor = executor
        self._pool = pool
        self._name = name
        self._work = work
        self._args = args
        self._weights = weights
        self._label = executor.label
        self._asked: Asked | None = None
        self._answer: tuple[Asked, Head] | None = None
        self._gone: WorkerError | None = None
        self._since = time.monotonic()
        self._ask()

    def __str__(self) -> str:
        return f"{self._name} on {self._pool.name}" if self._asked is None else self._asked.title

    @property
    def ref(self) -> Ref | None:
        """What arrives with the answer; None while nobody is asked."""
        return None if self._asked is None else self._asked.head

    @property
    def done(self) -> bool:
        """Whether `result` would return (or raise) at once. A dead process is noticed, and replaced, here too."""
        return self._settle(0)

    def result(self) -> T:
        timeout = self._executor.waiter.timeout_s
        while not self._settle(min(LOOK_S, timeout)):
            if time.monotonic() - self._since > timeout:
                late = [] if self._asked is None else [(self._asked.title, self._asked.worker)]
                raise WorkerError(self._executor.waiter.late(late))
        if self._gone is not None:
            raise self._gone
        assert self._answer is not None
        asked, head = self._answer
        if head.failure is not None:
            self._executor.waiter.fail(asked.title, head.failure)
        value: T = unpacked(head.value, asked.body)
        return value

    def _settle(self, timeout_s: float) -> bool:
        """Wait for at most ``timeout_s``; whether there is an answer, of whatever kind."""
        if self._answer is not None or self._gone is not None:
            return True
        if self._asked is None and not self._ask():
            self._executor.wait_caught_up(timeout_s)
            return False
        assert self._asked is not None
        if not ray.wait([self._asked.head], timeout=timeout_s)[0]:
            return False
        asked, self._asked = self._asked, None
        self._executor.count(self._pool, asked.rank, -1)
        head = read(asked.head)
        if isinstance(head, Head):
            self._answer = asked, head
            self._executor.waiter.events.append(head.event)
            return True
        try:
            self._executor.replace(self._pool, asked.rank, asked.worker, asked.title, head)
        except WorkerError as error:
            self._gone = error
            return True
        self._ask()
        return False

    def _ask(self) -> bool:
        """Ask whoever has the least to do; False if nobody can be asked now."""
        rank = self._executor.least_loaded(self._pool, self._weights)
        if rank is None:
            return False
        self._executor.count(self._pool, rank, 1)
        lane = "engine" if self._pool.together else "sample"
        with self._executor.labelled(self._label):
            self._asked = self._executor.ask(self._pool, rank, lane, self._name, self._work, self._args)
        self._since = time.monotonic()
        return True


def first_done(pending: Sequence[Pending[Any]], timeout_s: float) -> list[Pending[Any]]:
    """Those that are done, as soon as one is, or nothing after ``timeout_s``; asks of Ray once for all of them."""
    refs: dict[Ref, Pending[Any]] = {}
    done = []
    for one in pending:
        if isinstance(one, Remote) and one.ref is not None:
            refs[one.ref] = one
        elif one.done:
            done.append(one)
    if refs:
        if not done:
            ray.wait(list(refs), num_returns=1, timeout=timeout_s)
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        done += [refs[ref] for ref in ready if refs[ref].done]
    elif not done:
        time.sleep(timeout_s)
    return done
