"""The requests that one server works at, and their aborts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlcore.engines import GenerationRequest

INSIST_S = 0.5
"""After which time an abort is repeated for a request that was still on its way to the server."""


@dataclass(eq=False)
class Call:
    """One request; changed on the connection's thread.

    Attributes:
        task: works at it.
        server_id: the server's name of it; empty while it is not there.
        aborted: by the caller.
    """

    request: GenerationRequest
    task: asyncio.Task[Any] | None
    server_id: str = ""
    aborted: bool = False


class Calls:
    """Those that are open; used on the connection's thread.

    Args:
        abort: has the server abort what it was sent.
    """

    def __init__(self, abort: Callable[[Sequence[Call]], Awaitable[None]]) -> None:
        self._abort_sent = abort
        self._open: set[Call] = set()

    def __iter__(self) -> Iterator[Call]:
        return iter(self._open)

    @contextlib.contextmanager
    def begin(self, request: GenerationRequest) -> Iterator[Call]:
        """A call of the current task, open until the context is left."""
        call = Call(request, asyncio.current_task())
        self._open.add(call)
        try:
            yield call
        finally:
            self._open.discard(call)

    async def abort(self, request_ids: Sequence[str] | None) -> None:
        """Abort these, or all. The server is told of those that it has; the tasks of the others are cancelled."""
        calls = [call for call in self._open if request_ids is None or call.request.request_id in request_ids]
        for call in calls:
            call.aborted = True
            if not call.server_id and call.task is not None:
                call.task.cancel()
        sent = [call for call in calls if call.server_id]
        if sent:
            await self._abort_sent(sent)
            insisting = asyncio.ensure_future(self._insist(sent))
            insisting.add_done_callback(_ignore)

    async def _insist(self, calls: Sequence[Call]) -> None:
        """Repeat an abort for requests that had not arrived at the server yet."""
        while True:
            await asyncio.sleep(INSIST_S)
            left = [call for call in calls if call in self._open and call.server_id]
            if not left:
                return
            await self._abort_sent(left)


def _ignore(task: asyncio.Future[None]) -> None:
    """A server that dies while it is asked again has its requests to tell of it."""
    with contextlib.suppress(asyncio.CancelledError):
        task.exception()
