"""Timeouts that exclude pauses: while a server is paused, asleep or takes weights, it is not late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

POLL_S = 1.0
"""Seconds between two looks whether a pause has ended."""


class PauseClock:
    """Measures how long one server has been paused. Thread-safe; `begin` and `end` are idempotent."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._before_s = 0.0

    @property
    def paused(self) -> bool:
        """Whether a pause has begun and not ended."""
        return self._since is not None

    def begin(self) -> None:
        """Begin a pause."""
        if self._since is None:
            self._since = time.monotonic()

    def end(self) -> None:
        """End the pause."""
        if self._since is not None:
            self._before_s += time.monotonic() - self._since
            self._since = None

    def seconds(self) -> float:
        """Return the total time of all pauses, the current one included."""
        since = self._since
        return self._before_s + (0.0 if since is None else time.monotonic() - since)

    async def with_timeout(
        self,
        limit_s: float,
        work: Coroutine[Any, Any, T],
        *,
        check: Callable[[], Awaitable[None]] | None = None,
        check_every_s: float = float("inf"),
    ) -> T:
        """Return the result of ``work``, or cancel it when it has taken ``limit_s`` seconds without pauses.

        Args:
            check: awaited every ``check_every_s`` seconds outside of pauses; an exception of it ends the wait.

        Raises:
            TimeoutError: ``work`` took longer.
        """
        task = asyncio.ensure_future(work)
        start, paused_before = time.monotonic(), self.seconds()
        try:
            while True:
                left = limit_s - (time.monotonic() - start) + (self.seconds() - paused_before)
                done, _ = await asyncio.wait({task}, timeout=min(max(left, 0), check_every_s))
                if done:
                    return task.result()
                if self.paused:
                    await asyncio.wait({task}, timeout=min(limit_s, POLL_S))
                elif left <= 0:
                    raise TimeoutError
                elif check is not None:
                    await check()
        finally:
            task.cancel()
