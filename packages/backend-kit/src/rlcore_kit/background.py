"""Work on a thread of its own, beside a program that must not wait for it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str, niceness: int = 0) -> Future[T]:
    """Start ``work`` on a thread named ``name``; its result or error is in the future.

    The thread ends with the process, unlike those of `concurrent.futures`, which the interpreter's exit waits for.

    Args:
        niceness: how far the thread gives way to others where there are fewer cores than threads (Linux only).
    """
    future: Future[T] = Future()

    def run() -> None:
        if niceness and sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        try:
            result = work()
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
