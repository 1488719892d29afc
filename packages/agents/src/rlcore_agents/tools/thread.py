"""Blocking calls of coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from threading import Thread
from typing import Any, TypeVar

from rlcore.boundary import reason

T = TypeVar("T")


async def in_thread(call: Callable[[], T]) -> T:
    """Run ``call`` in a daemon thread and return its result.

    A call that never ends costs its thread. The threads of asyncio's own pool are joined when the loop ends, so
    that one such call would keep the process from ending.

    Raises:
        Exception: that of the call; SystemExit and its kind, which would end the event loop, as RuntimeError.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = copy_context()

    def settle(act: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            act(value)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = future.set_result, context.run(call)
        except BaseException as error:
            # a future refuses StopIteration
            plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
            outcome = future.set_exception, error if plain else RuntimeError(reason(error))
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, *outcome)

    Thread(target=run, name="tool call", daemon=True).start()
    return await future
