"""Concurrent calls that may hang, each in a separate thread, and their failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from rlcore.errors import WorkerError


class ThreadedCall:
    """A call that runs in a daemon thread; if it hangs, the thread is abandoned.

    Attributes:
        error: exception of the call; None while it runs and if it succeeded.
        done: set when the call has ended.
    """

    def __init__(self, name: str, act: Callable[[], Any]) -> None:
        self.error: Exception | None = None
        self.done = threading.Event()
        self._act = act
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._act()
        except Exception as error:
            self.error = error
        finally:
            self.done.set()


def failures_of(threads: Mapping[int, ThreadedCall], timeout_s: float, what: str) -> dict[int, Exception]:
    """Wait for all ``threads`` and return their exceptions by key; a call that does not end is a `WorkerError`."""
    deadline = time.monotonic() + timeout_s
    failures: dict[int, Exception] = {}
    for index, thread in threads.items():
        if not thread.done.wait(max(deadline - time.monotonic(), 0)):
            failures[index] = WorkerError(f"it did not {what} within {timeout_s:g} s")
        elif thread.error is not None:
            failures[index] = thread.error
    return failures
