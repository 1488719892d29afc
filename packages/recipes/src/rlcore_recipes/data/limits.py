"""Limits on computing time and memory for code that comes with a model's files and runs here: its chat template."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CPU_SECONDS = 10.0
MEMORY_BYTES = 1 << 30


class LimitReached(BaseException):
    """Code under `limited` exceeded its time or memory.

    No `Exception`: Jinja goes on after those that it meets in constant expressions.
    """


@contextmanager
def limited() -> Iterator[None]:
    """Bound what runs inside to `CPU_SECONDS` of this process and `MEMORY_BYTES` more memory than it has.

    The time is bounded in the main thread only, where Python handles signals; the memory on Linux only.

    Raises:
        LimitReached: it took or asked for more.
    """
    with _limited_memory(), _limited_time():
        yield


@contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise LimitReached(f"it does not end within {CPU_SECONDS:g} seconds of computing time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _limited_memory() -> Iterator[None]:
    try:
        with open("/proc/self/statm", "rb") as statm:
            pages = int(statm.read().split()[0])
    except FileNotFoundError:  # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError as error:
        raise LimitReached(f"it asks for more than {MEMORY_BYTES >> 20} MiB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
