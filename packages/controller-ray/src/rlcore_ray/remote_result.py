"""`RemoteResult`: the result of a call to any process of a pool; if that process dies, the call is repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import ray

from rlcore.controller.pending import Pending
from rlcore.errors import WorkerError
from rlcore_ray.answers import PendingCall, Ref, read
from rlcore_ray.calls import Response, unpacked
from rlcore_ray.pool import Pool
from rlcore_ray.workers import Workers

T = TypeVar("T")

POLL_S = 10.0
"""Maximum time to wait inside of Ray before the clock is read again."""


class RemoteResult(Generic[T]):
    """The `Pending` result of a call to the process of ``pool`` with the fewest unfinished calls.

    Used by one thread at a time. ``str(result)`` names the call and its process.

    Args:
        needs_weights: call only processes that have the current weights.
    """

    def __init__(
        self,
        workers: Workers,
        pool: Pool,
        name: str,
        work: Callable[..., Any],
        args: tuple[Any, ...],
        needs_weights: bool = False,
    ) -> None:
        self._workers = workers
        self._pool = pool
        self._name = name
        self._work = work
        self._args = args
        self._needs_weights = needs_weights
        self._label = workers.label
        self._call: PendingCall | None = None
        self._answer: tuple[PendingCall, Response] | None = None
        self._error: WorkerError | None = None
        self._started = time.monotonic()
        self._start()

    def __str__(self) -> str:
        return f"{self._name} on {self._pool.name}" if self._call is None else self._call.title

    @property
    def ref(self) -> Ref | None:
        """What arrives with the response; None while no process can be called."""
        return None if self._call is None else self._call.response

    @property
    def done(self) -> bool:
        """Whether `result` would return (or raise) without waiting. A process that died is replaced here too."""
        return self._settle(0)

    def result(self) -> T:
        timeout_s = self._workers.waiter.timeout_s
        while not self._settle(min(POLL_S, timeout_s)):
            if time.monotonic() - self._started > timeout_s:
                late = [] if self._call is None else [(self._call.title, self._call.worker)]
                raise WorkerError(self._workers.waiter.late(late))
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        call, response = self._answer
        if response.failure is not None:
            self._workers.waiter.fail(call.title, response.failure)
        value: T = unpacked(response.value, call.body)
        return value

    def _settle(self, timeout_s: float) -> bool:
        """Wait for at most ``timeout_s``; return whether there is a response or an error."""
        if self._answer is not None or self._error is not None:
            return True
        if self._call is None and not self._start():
            self._workers.wait_updated(timeout_s)
            return False
        assert self._call is not None
        if not ray.wait([self._call.response], timeout=timeout_s)[0]:
            return False
        call, self._call = self._call, None
        self._workers.add_load(self._pool, call.rank, -1)
        response = read(call.response)
        if isinstance(response, Response):
            self._answer = call, response
            self._workers.waiter.add_event(response.event)
            return True
        try:
            self._workers.replace(call, response)
        except WorkerError as error:
            self._error = error
            return True
        self._start()
        return False

    def _start(self) -> bool:
        """Call the process with the fewest unfinished calls; return False if no process can be called now."""
        rank = self._workers.least_loaded(self._pool, self._needs_weights)
        if rank is None:
            return False
        self._workers.add_load(self._pool, rank, 1)
        concurrency_group = "engine" if self._pool.one_world else "sample"
        with self._workers.trace_label(self._label):
            self._call = self._workers.call(self._pool, rank, concurrency_group, self._name, self._work, self._args)
        self._started = time.monotonic()
        return True


def first_done(pending: Sequence[Pending[Any]], timeout_s: float) -> list[Pending[Any]]:
    """Wait until one of ``pending`` is done and return all that are; none after ``timeout_s``.

    Ray is asked once for all of them.
    """
    refs: dict[Ref, Pending[Any]] = {}
    done = []
    for one in pending:
        if isinstance(one, RemoteResult) and one.ref is not None:
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
