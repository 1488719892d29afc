"""Run work on a background thread that does not delay the exit of the process."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str, niceness: int = 0) -> Future[T]:
    """Start ``work`` on a daemon thread and return the future of its result or error.

    The thread ends with the process. The interpreter waits at exit for threads of `concurrent.futures`, but not for
    this one.

    Args:
        name: name of the thread.
        niceness: nice value of the thread, which lowers its priority where cores are scarce (Linux only).
    """
    future: Future[T] = Future()

    def run() -> None:
        if niceness and sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        try:
            result = work()
        except BaseException as error:  # raised by future.result()
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
