"""The time in which a server stands still (paused, asleep, or taking weights), which is no fault of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

LOOK_S = 1.0
"""How often waiting looks whether the server still stands still."""


class Standstill:
    """A clock of one server's standstills. Any thread may `begin` and `end` one; again changes nothing."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._before_s = 0.0

    @property
    def lasts(self) -> bool:
        return self._since is not None

    def begin(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def end(self) -> None:
        if self._since is not None:
            self._before_s += time.monotonic() - self._since
            self._since = None

    def seconds(self) -> float:
        """How long the server has stood still in all."""
        since = self._since
        return self._before_s + (0.0 if since is None else time.monotonic() - since)

    async def within(
        self,
        limit_s: float,
        work: Coroutine[Any, Any, T],
        *,
        look: Callable[[], Awaitable[None]] | None = None,
        look_every_s: float = float("inf"),
    ) -> T:
        """The result of ``work``, which is cancelled if it takes ``limit_s`` beside standstills.

        Args:
            look: awaited every ``look_every_s`` seconds outside standstills; what it raises ends the waiting.

        Raises:
            TimeoutError: it took longer.
        """
        task = asyncio.ensure_future(work)
        start, stood = time.monotonic(), self.seconds()
        try:
            while True:
                left = limit_s - (time.monotonic() - start) + (self.seconds() - stood)
                done, _ = await asyncio.wait({task}, timeout=min(max(left, 0), look_every_s))
                if done:
                    return task.result()
                if self.lasts:
                    await asyncio.wait({task}, timeout=min(limit_s, LOOK_S))
                elif left <= 0:
                    raise TimeoutError
                elif look is not None:
                    await look()
        finally:
            task.cancel()
