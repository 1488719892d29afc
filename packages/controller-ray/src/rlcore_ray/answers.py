"""Waiting for responses of workers: with a timeout, and finding out which of several failures was the first."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import ray

from rlcore.controller.executor import Event
from rlcore.errors import WorkerDied, WorkerError
from rlcore_ray.calls import Failure, Response, cause_of_death
from rlcore_ray.pool import Pool

Ref = ray.ObjectRef[Any]

SETTLE_S = 5.0
"""After a failure, how long to wait for the failures of others: the death of one process breaks the connections of
other processes, which may report that before Ray notices the death."""

STACKS_S = 5.0
"""Timeout for a worker to say what its threads are doing."""


@dataclass(frozen=True)
class PendingCall:
    """A call that a worker was given.

    Attributes:
        worker: the actor handle of the process ``rank`` of ``pool`` at that time; it may be replaced since.
        response: reference to the `Response`, and ``body`` to the batches of its result.
    """

    name: str
    pool: Pool
    rank: int
    worker: Any
    response: Ref
    body: Ref

    @property
    def title(self) -> str:
        """How messages name the call."""
        return f"{self.name} on {self.pool.title(self.rank)}"


class Waiter:
    """Waits for responses and collects the events of the timeline in them.

    Args:
        timeout_s: timeout of one response.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._unread: list[PendingCall] = []
        self._events: list[Event] = []

    def defer(self, calls: Iterable[PendingCall]) -> None:
        """Note calls whose responses are read later; their failures are raised by the next `wait`."""
        self._unread += calls

    def add_event(self, event: Event) -> None:
        """Add an event to the timeline."""
        self._events.append(event)

    def take_events(self) -> list[Event]:
        """Return the events since the last call of this method.

        Raises:
            RlcoreError: a deferred call failed (see `wait`).
        """
        self._check()
        taken, self._events = self._events, []
        return taken

    def wait(self, calls: Sequence[PendingCall]) -> list[Response]:
        """Return the responses, in the order of ``calls``.

        Raises:
            RlcoreError: a worker raised it.
            WorkerDied: a worker is gone.
            WorkerError: any other failure in a worker, with its traceback; or no response in time.
        """
        responses: dict[Ref, Response | Exception] = {}
        watched = {call.response: call for call in (*self._unread, *calls)}
        wanted = {call.response for call in calls}
        deadline = time.monotonic() + self.timeout_s
        while wanted - responses.keys():
            open_ = [ref for ref in watched if ref not in responses]
            ready, _ = ray.wait(open_, timeout=max(min(deadline - time.monotonic(), 10.0), 0))
            for ref in ready:
                responses[ref] = read(ref)
                if _failed(responses[ref]):
                    self._raise_first(watched, responses)
            if not ready and time.monotonic() > deadline:
                late = [(call.title, call.worker) for call in calls if call.response not in responses]
                raise WorkerError(self.late(late))
        self._note(responses)
        return [found for call in calls for found in [responses[call.response]] if isinstance(found, Response)]

    def collect(self, calls: Sequence[PendingCall]) -> list[Response | Exception]:
        """Return all responses, failures included, in the order of ``calls``; an exception for a worker that is gone.

        Raises:
            WorkerError: no response in time.
        """
        refs = [call.response for call in calls]
        _, late = ray.wait(refs, num_returns=len(refs), timeout=self.timeout_s)
        if late:
            raise WorkerError(self.late([(call.title, call.worker) for call in calls if call.response in late]))
        responses = [read(ref) for ref in refs]
        self._events.extend([found.event for found in responses if isinstance(found, Response)])
        return responses

    def settle(self) -> None:
        """Wait for all deferred calls."""
        self.wait(list(self._unread))

    def fail(self, title: str, failure: Failure) -> NoReturn:
        """Raise ``failure`` of the call ``title``, or the earlier failure that may have caused it.

        That is the failure of a deferred call whose result it was given, or the death of a worker that it was
        communicating with.

        Raises:
            RlcoreError, WorkerDied, WorkerError: see `wait`.
        """
        watched = {call.response: call for call in self._unread}
        responses: dict[Ref, Response | Exception] = {}
        self._gather(watched, responses)
        if any(map(_failed, responses.values())):
            self._raise_first(watched, responses)
        raise_failure(title, failure)

    def late(self, late: Sequence[tuple[str, Any]]) -> str:
        """Return a message about calls without a response in time, and what the first of their workers is doing.

        Deferred calls that have not ended either are named first: the others may be waiting for them.

        Args:
            late: titles of calls, with the worker of each.
        """
        refs = [call.response for call in self._unread]
        ended = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()
        earlier = [(call.title, call.worker) for call in self._unread if call.response not in ended]
        calls = list(dict(reversed([*earlier, *late])).items())[::-1]
        if not calls:
            return f"no answer within {self.timeout_s:g} s"
        try:
            doing = ray.get(calls[0][1].stacks.remote(), timeout=STACKS_S)
        except (ray.exceptions.RayError, TimeoutError):
            doing = "unknown: its worker does not answer"
        names = ", ".join(title for title, _ in calls)
        return f"no answer within {self.timeout_s:g} s from {names}\n\nthe first of them is at\n{doing}"

    def _check(self) -> None:
        """Read the responses that have arrived of deferred calls; raise if one failed."""
        watched = {call.response: call for call in self._unread}
        ready, _ = ray.wait(list(watched), num_returns=len(watched), timeout=0) if watched else ([], [])
        responses: dict[Ref, Response | Exception] = {ref: read(ref) for ref in ready}
        if any(_failed(found) for found in responses.values()):
            self._raise_first(watched, responses)
        self._note(responses)

    def _note(self, responses: Mapping[Ref, Response | Exception]) -> None:
        """Take calls with ``responses`` out of the deferred ones and their events into the timeline."""
        self._unread = [call for call in self._unread if call.response not in responses]
        self._events.extend([found.event for found in responses.values() if isinstance(found, Response)])

    def _gather(self, watched: Mapping[Ref, PendingCall], responses: dict[Ref, Response | Exception]) -> None:
        """Add the responses that arrive within `SETTLE_S`, or until a death is among them."""
        rest = [ref for ref in watched if ref not in responses]
        until = time.monotonic() + SETTLE_S
        while rest and time.monotonic() < until and not any(isinstance(r, Exception) for r in responses.values()):
            ready, rest = ray.wait(rest, timeout=max(until - time.monotonic(), 0))
            responses |= {ref: read(ref) for ref in ready}

    def _raise_first(self, watched: Mapping[Ref, PendingCall], responses: dict[Ref, Response | Exception]) -> NoReturn:
        """Raise a death, or else the failure that happened first, after waiting for the failures of others."""
        self._gather(watched, responses)
        self._unread = []  # their workers are ended next
        for ref, found in responses.items():
            if isinstance(found, Exception):
                raise WorkerDied(f"{watched[ref].title} is gone: {cause_of_death(found)}") from found
        failed = [
            (found.event.end, watched[ref].title, found.failure)
            for ref, found in responses.items()
            if isinstance(found, Response) and found.failure is not None
        ]
        _, title, failure = min(failed, key=lambda item: item[0])
        raise_failure(title, failure)


def read(ref: Ref) -> Response | Exception:
    """Return a response that has arrived, or the error of Ray why there is none."""
    try:
        response: Response = ray.get(ref, timeout=60)
    except ray.exceptions.RayError as error:
        return error
    return response


def raise_failure(title: str, failure: Failure) -> NoReturn:
    """Raise what a worker raised: an `RlcoreError` as such, others with the worker's traceback."""
    if failure.error_type is not None:
        raise failure.error_type(f"{title}: {failure.error}")
    raise WorkerError(f"{title}: {failure.error}\n\n{failure.trace.rstrip()}")


def _failed(response: Response | Exception) -> bool:
    return isinstance(response, Exception) or response.failure is not None
