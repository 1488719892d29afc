"""Requests that one server has not answered yet, and their aborts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlcore.engines.rollout import Completion, GenerationRequest

REPEAT_ABORT_S = 0.5
"""Seconds after which an abort is repeated, for a request that had not arrived at the server."""


@dataclass(eq=False)
class Call:
    """One request; changed on the connection's thread only.

    Attributes:
        task: awaits the answer.
        server_id: id under which the server knows the request; empty while it was not sent.
        aborted: by the caller.
        completion: what was generated before the server ended the request early.
    """

    request: GenerationRequest
    task: asyncio.Task[Any] | None
    server_id: str = ""
    aborted: bool = False
    completion: Completion = field(init=False)

    def __post_init__(self) -> None:
        self.completion = Completion([], [], "abort", request_id=self.request.request_id)


class Calls:
    """Unanswered calls; used on the connection's thread only.

    Args:
        abort: aborts calls on the server.
    """

    def __init__(self, abort: Callable[[Sequence[Call]], Awaitable[None]]) -> None:
        self._abort_sent = abort
        self._open: set[Call] = set()

    def __iter__(self) -> Iterator[Call]:
        return iter(self._open)

    @contextlib.contextmanager
    def begin(self, request: GenerationRequest) -> Iterator[Call]:
        """Register a call of the current task until the context is left."""
        call = Call(request, asyncio.current_task())
        self._open.add(call)
        try:
            yield call
        finally:
            self._open.discard(call)

    async def abort(self, request_ids: Sequence[str] | None) -> None:
        """Abort the given requests, or all: calls that were sent on the server, others by cancelling their task."""
        calls = [call for call in self._open if request_ids is None or call.request.request_id in request_ids]
        for call in calls:
            call.aborted = True
            if not call.server_id and call.task is not None:
                call.task.cancel()
        sent = [call for call in calls if call.server_id]
        if sent:
            await self._abort_sent(sent)
            repeating = asyncio.ensure_future(self._repeat_abort(sent))
            repeating.add_done_callback(_ignore_exception)

    async def _repeat_abort(self, calls: Sequence[Call]) -> None:
        """Repeat an abort for requests that had not arrived at the server yet."""
        while True:
            await asyncio.sleep(REPEAT_ABORT_S)
            left = [call for call in calls if call in self._open and call.server_id]
            if not left:
                return
            await self._abort_sent(left)


def _ignore_exception(task: asyncio.Future[None]) -> None:
    # if the server dies, its requests fail and report it
    with contextlib.suppress(asyncio.CancelledError):
        task.exception()
