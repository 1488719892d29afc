"""Wall-clock time of the parts of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rlcore.boundary import boundary
from rlcore.controller import Event, Executor
from rlcore.errors import ConfigError
from rlcore_recipes.ranks import is_main
from rlcore_recipes.run.folder import TIMELINE
from rlcore_recipes.run.trace_file import CONTROLLER, TraceFile


class Timings:
    """``with timings("gen"): …`` adds to the seconds of "gen".

    What other processes do belongs to the part that asked them for it. Several may work on it together, and still when
    the part is over, so the seconds of a part are those in which any process worked on it. Work counts in the step in
    which it ends.

    Args:
        executor: tells what other processes did.
        record: is given everything that was done, at every `take`.
    """

    def __init__(self, executor: Executor | None = None, record: Callable[[list[Event]], None] | None = None) -> None:
        self._executor = executor
        self._record = record
        self._events: list[Event] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started, start = time.time(), time.perf_counter()
        try:
            with self.label(name):
                yield
        finally:
            self._events.append(Event(name, name, CONTROLLER, started, started + time.perf_counter() - start))

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Let calls made in the block belong to "name"; their time is that of the workers alone."""
        if self._executor is None:
            yield
        else:
            with self._executor.trace_label(name):
                yield

    def seconds(self, name: str) -> float:
        """Return the seconds of "name" in this process since the last `take`."""
        return covered(event for event in self._events if event.label == name)

    def take(self) -> dict[str, float]:
        """Return all seconds since the last call, by name."""
        events, self._events = self._events, []
        if self._executor is not None:
            events += self._executor.timeline()
        if self._record is not None:
            self._record(events)
        parts: defaultdict[str, list[Event]] = defaultdict(list)
        for event in events:
            if event.label:
                parts[event.label].append(event)
        return {name: covered(part) for name, part in parts.items()}


def covered(events: Iterable[Event]) -> float:
    """Return the seconds in which at least one of ``events`` was going on."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(event.end - max(event.start, until), 0.0)
        until = max(until, event.end)
    return total


def open_trace(out_dir: Path, stack: ExitStack) -> Callable[[list[Event]], None] | None:
    """Return a function that writes events to the run's timeline, which ``stack`` completes; None on other ranks.

    Raises:
        ConfigError: something else than a trace has its name.
    """
    if not is_main():
        return None
    with boundary(f"the trace {out_dir / TIMELINE} cannot be written; move away what is there", ConfigError):
        trace = TraceFile(out_dir / TIMELINE)
    stack.callback(trace.close)
    return trace.append
