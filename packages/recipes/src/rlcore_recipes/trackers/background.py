"""A tracker in a separate thread, so that training never waits for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from warnings import warn

from rlcore.boundary import reason
from rlcore.errors import RlcoreWarning
from rlcore.tracking import Tracker

BACKLOG = 256
"""Calls that wait for a tracker at most; of more, the oldest are dropped."""
CLOSE_S = 60.0
"""Seconds that the end of a run waits for a tracker."""

Call = Callable[[Tracker], None]


class BackgroundTracker(Tracker):
    """Builds a tracker and calls it in a daemon thread, in the order of the calls.

    A tracker that cannot be built, fails, hangs or is too slow is warned about once for each of these, and loses data;
    the thread that trains never waits for it, but for up to `CLOSE_S` seconds in `close`.
    """

    def __init__(self, name: str, build: Callable[[], Tracker]) -> None:
        self._name = name
        self._build = build
        self._calls: deque[Call] = deque()
        self._changed = threading.Condition()
        self._closing = self._given_up = False
        self._deadline = 0.0
        self._dropped = 0
        self._tracker: Tracker | None = None
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand ``metrics`` over."""
        copy = dict(metrics)
        self._put(lambda tracker: tracker.log(copy, step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._put(lambda tracker: tracker.log_table(name, columns, rows, step))

    def log_histogram(self, name: str, edges: Sequence[float], counts: Sequence[int], step: int) -> None:
        self._put(lambda tracker: tracker.log_histogram(name, edges, counts, step))

    def progress(self, what: str, done: int, total: int, step: int) -> None:
        if self._tracker is not None:
            self._tracker.progress(what, done, total, step)

    def finish(self) -> None:
        """Take no more calls; the tracker is closed after those that were handed over."""
        with self._changed:
            if not self._closing:
                self._closing = True
                self._deadline = time.monotonic() + CLOSE_S
                self._changed.notify()

    def close(self) -> None:
        """Wait for the end, for at most `CLOSE_S` seconds from `finish` on, which this calls."""
        self.finish()
        self._thread.join(max(self._deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            self._warn("hang", f"did not finish within {CLOSE_S:g} s and misses the last {self._left()} calls")
        if self._dropped:
            self._warn("total", f"was too slow; {self._dropped} of its calls were dropped")

    def _left(self) -> int:
        with self._changed:
            self._given_up = True
            return len(self._calls) + 1

    def _put(self, call: Call) -> None:
        with self._changed:
            if self._given_up or self._closing:
                return
            if len(self._calls) == BACKLOG:
                self._calls.popleft()
                self._dropped += 1
            self._calls.append(call)
            self._changed.notify()
        if self._dropped:
            self._warn("slow", f"is too slow: {BACKLOG} calls wait for it, so the oldest are dropped")

    def _take(self) -> Call | None:
        """Return the next call; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._closing)
            return self._calls.popleft() if self._calls and not self._given_up else None

    def _work(self) -> None:
        try:
            tracker = self._tracker = self._build()
        except BaseException as error:  # no connection, no account …
            with self._changed:
                self._given_up = True
                self._calls.clear()
            self._warn("start", f"could not be started: {reason(error)}")
            return
        while (call := self._take()) is not None:
            self._try(call, tracker)
        if not self._given_up:
            self._try(lambda opened: opened.close(), tracker)

    def _try(self, call: Call, tracker: Tracker) -> None:
        try:
            call(tracker)
        except BaseException as error:  # SwanLab raises KeyboardInterrupt for a run that was stopped in its dashboard
            self._warn("failure", f"failed and may miss data: {reason(error)}")

    def _warn(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warn(f"tracker {self._name} {message}", RlcoreWarning, stacklevel=3)
