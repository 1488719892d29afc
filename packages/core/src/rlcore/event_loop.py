"""Run coroutines from plain functions, also where the thread has an event loop that runs, as in a notebook."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Runner:
    """As `asyncio.Runner`; below an event loop that runs, it works in a thread, and the caller waits for that.

    asyncio refuses to run a second event loop in a thread, and the cells of a notebook run inside of one.

    Attributes:
        loop: the event loop.
    """

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="event-loop") if _inside_a_loop() else None
        get_loop = self._runner.get_loop  # makes the loop that of the thread
        self.loop = get_loop() if self._thread is None else self._thread.submit(get_loop).result()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` to its end and return its result."""
        if self._thread is None:
            return self._runner.run(coroutine)
        done = self._thread.submit(copy_context().run, self._runner.run, coroutine)
        try:
            return done.result()
        except BaseException:
            if not done.done():  # the caller was interrupted while it waited
                self.loop.call_soon_threadsafe(_cancel_all, self.loop)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what is unfinished."""
        if self._thread is None:
            self._runner.close()
        else:
            self._thread.submit(self._runner.close).result()
            self._thread.shutdown()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` to its end and return its result, as `asyncio.run` does, in a notebook too."""
    with Runner() as runner:
        return runner.run(coroutine)


def _inside_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
