"""Waiting for workers: who is waited for, how long, and which of several failures was the first."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import ray

from rlcore.controller.executor import Event
from rlcore.errors import WorkerDied, WorkerError
from rlcore_ray.calls import Failure, Head

if TYPE_CHECKING:
    from rlcore_ray.pool import Pool

Ref = ray.ObjectRef[Any]

SETTLE_S = 5.0
"""After a failure, how long others are given to report theirs: the death of one process breaks the connections of the
others, which may notice it before Ray does."""

STACKS_S = 5.0


@dataclass(frozen=True)
class Asked:
    """A call that a worker was given."""

    name: str
    pool: Pool
    rank: int
    worker: Any
    head: Ref
    body: Ref

    @property
    def title(self) -> str:
        return f"{self.name} on {self.pool.title(self.rank)}"


class Waiter:
    """Waits for answers, and keeps what they tell of the timeline.

    Args:
        timeout_s: longest wait for one answer.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._unread: list[Asked] = []
        self.events: list[Event] = []

    def later(self, asked: Iterable[Asked]) -> None:
        """Note calls whose answers nobody waits for yet; their failures are found by the next `wait`."""
        self._unread += asked

    def wait(self, asked: Sequence[Asked]) -> list[Head]:
        """The answers, in the order of ``asked``.

        Raises:
            RlcoreError: what a worker raised, if it is one of ours.
            WorkerDied: a worker is gone.
            WorkerError: any other failure in a worker, with its traceback; or no answer in time.
        """
        heads: dict[Ref, Head | Exception] = {}
        watched = {call.head: call for call in (*self._unread, *asked)}
        wanted = {call.head for call in asked}
        deadline = time.monotonic() + self.timeout_s
        while wanted - heads.keys():
            open_ = [ref for ref in watched if ref not in heads]
            ready, _ = ray.wait(open_, timeout=max(min(deadline - time.monotonic(), 10.0), 0))
            for ref in ready:
                heads[ref] = read(ref)
                if _failed(heads[ref]):
                    self._raise_first(watched, heads)
            if not ready and time.monotonic() > deadline:
                raise WorkerError(self.late([(call.title, call.worker) for call in asked if call.head not in heads]))
        self._unread = [call for call in self._unread if call.head not in heads]
        found = [head for head in heads.values() if isinstance(head, Head)]
        self.events.extend([head.event for head in found])
        return [head for call in asked for head in [heads[call.head]] if isinstance(head, Head)]

    def collect(self, asked: Sequence[Asked]) -> list[Head | Exception]:
        """All answers, in the order of ``asked``, failures among them; an exception in the place of a dead worker's.

        Raises:
            WorkerError: no answer in time.
        """
        refs = [call.head for call in asked]
        _, late = ray.wait(refs, num_returns=len(refs), timeout=self.timeout_s)
        if late:
            raise WorkerError(self.late([(call.title, call.worker) for call in asked if call.head in late]))
        heads = [read(ref) for ref in refs]
        self.events.extend([head.event for head in heads if isinstance(head, Head)])
        return heads

    def check(self) -> None:
        """Note what has ended of the calls that nobody waited for.

        Raises:
            RlcoreError: one failed (see `wait`).
        """
        watched = {call.head: call for call in self._unread}
        ready, _ = ray.wait(list(watched), num_returns=len(watched), timeout=0) if watched else ([], [])
        heads: dict[Ref, Head | Exception] = {ref: read(ref) for ref in ready}
        if any(_failed(head) for head in heads.values()):
            self._raise_first(watched, heads)
        self._unread = [call for call in self._unread if call.head not in heads]
        self.events.extend([head.event for head in heads.values() if isinstance(head, Head)])

    def settle(self) -> None:
        """Wait for everything that was asked so far."""
        self.wait(list(self._unread))

    def forget(self) -> None:
        """Give up on what is unread: its workers are being ended."""
        self._unread = []

    def fail(self, title: str, failure: Failure) -> NoReturn:
        """Raise ``failure`` of the call ``title``, or what it may follow from: an earlier call, whose result it was
        given, failed; a worker that it was talking to died.

        Raises:
            RlcoreError, WorkerDied, WorkerError: see `wait`.
        """
        watched = {call.head: call for call in self._unread}
        heads: dict[Ref, Head | Exception] = {}
        self._gather(watched, heads)
        if any(map(_failed, heads.values())):
            self._raise_first(watched, heads)
        raise_failure(title, failure)

    def late(self, late: Sequence[tuple[str, Any]]) -> str:
        """Who did not answer in time, and what the first of them is doing.

        Calls that were asked earlier and have not ended either come first: the others may be waiting for them.

        Args:
            late: calls by their titles, with the worker of each.
        """
        refs = [call.head for call in self._unread]
        ended = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()
        earlier = [(call.title, call.worker) for call in self._unread if call.head not in ended]
        calls = list(dict(reversed([*earlier, *late])).items())[::-1]
        if not calls:
            return f"no answer within {self.timeout_s:g} s"
        try:
            doing = ray.get(calls[0][1].stacks.remote(), timeout=STACKS_S)
        except (ray.exceptions.RayError, TimeoutError):
            doing = "it does not say what it is doing"
        names = ", ".join(title for title, _ in calls)
        return f"no answer within {self.timeout_s:g} s from {names}\n\nthe first of them is at\n{doing}"

    def _gather(self, watched: Mapping[Ref, Asked], heads: dict[Ref, Head | Exception]) -> None:
        """Give others a moment to tell what went wrong with them too; a death ends it."""
        rest = [ref for ref in watched if ref not in heads]
        until = time.monotonic() + SETTLE_S
        while rest and time.monotonic() < until and not any(isinstance(h, Exception) for h in heads.values()):
            ready, rest = ray.wait(rest, timeout=max(until - time.monotonic(), 0))
            heads |= {ref: read(ref) for ref in ready}

    def _raise_first(self, watched: Mapping[Ref, Asked], heads: dict[Ref, Head | Exception]) -> NoReturn:
        """Raise what went wrong first, after giving the others a moment to tell."""
        self._gather(watched, heads)
        self.forget()
        for ref, head in heads.items():
            if isinstance(head, Exception):
                raise WorkerDied(f"{watched[ref].title} is gone: {death(head)}") from head
        failed = [(head.event.end, ref) for ref, head in heads.items() if isinstance(head, Head) and head.failure]
        _, ref = min(failed, key=lambda item: item[0])
        head = heads[ref]
        assert isinstance(head, Head)
        assert head.failure is not None
        raise_failure(watched[ref].title, head.failure)


def read(ref: Ref) -> Head | Exception:
    """A head that has arrived, or why it never will."""
    try:
        head: Head = ray.get(ref, timeout=60)
    except ray.exceptions.RayError as error:
        return error
    return head


def raise_failure(title: str, failure: Failure) -> NoReturn:
    """Raise what a worker raised: errors of ours as such, others with the worker's traceback."""
    if failure.error_type is not None:
        raise failure.error_type(f"{title}: {failure.error}")
    raise WorkerError(f"{title}: {failure.error}\n\n{failure.trace.rstrip()}")


def death(error: Exception) -> str:
    """One line about why a worker is gone."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "died" in line.lower() or "node" in line.lower()]
    return (telling or lines or [type(error).__name__])[0]


def _failed(head: Head | Exception) -> bool:
    return isinstance(head, Exception) or head.failure is not None
