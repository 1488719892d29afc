"""Timelines as files for trace viewers (https://ui.perfetto.dev, chrome://tracing)."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlcore.controller.executor import Event
from rlcore.regular_file import open_regular

CONTROLLER = "controller"
_TAIL_BYTES = 1 << 16


@dataclass
class _Lane:
    """One row of a track: events on it may nest but must not overlap partially."""

    open: list[float] = field(default_factory=list)  # ends of the events around the last one, and of that one
    start: float = float("-inf")  # of the last event
    end: float = float("-inf")  # of the latest one to end

    def place(self, event: Event) -> bool:
        """Put ``event`` here, if there is room."""
        if event.start < self.start and event.start < self.end:
            return False  # reported out of order: the events that it would overlap are not known any more
        ends = [end for end in self.open if end > event.start]
        if ends and ends[-1] < event.end:
            return False
        self.open, self.start, self.end = [*ends, event.end], event.start, max(self.end, event.end)
        return True


class TraceFile:
    """Appends events to a file in the JSON array format of Chrome traces.

    Every process of a run is a process of the trace; what it does at the same time is on several threads of it.
    Times are µs since the epoch. The format allows the closing bracket to be missing, so the file can be read at any
    time, also after the run was killed; a run that goes on appends to it.

    Source: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._workers: dict[str, int] = {}
        self._lanes: dict[str, list[_Lane]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._empty = _open_end(path)

    def append(self, events: Sequence[Event]) -> None:
        """Write ``events``; they are on disk afterwards, as far as this process is concerned."""
        records = [
            record for event in sorted(events, key=lambda e: (e.start, -e.end)) for record in self._records(event)
        ]
        if not records:
            return
        text = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("[\n" if self._empty else ",\n") + text)
        self._empty = False

    def close(self) -> None:
        """Complete the array."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write("[]\n" if self._empty else "\n]\n")

    def _records(self, event: Event) -> Iterable[dict[str, Any]]:
        """Yield the event, after the names of processes and rows that appear for the first time."""
        if event.worker not in self._workers:
            self._workers[event.worker] = 0 if event.worker == CONTROLLER else len(self._workers) + 1
            yield from self._named("process", self._workers[event.worker], 0, event.worker)
        process, lanes = self._workers[event.worker], self._lanes.setdefault(event.worker, [])
        thread = next((number for number, lane in enumerate(lanes) if lane.place(event)), len(lanes))
        if thread == len(lanes):
            lanes.append(_Lane())
            lanes[-1].place(event)
            yield from self._named(
                "thread", process, thread, event.worker if not thread else f"{event.worker} +{thread}"
            )
        yield {
            "name": event.name,
            "cat": event.label or event.name,
            "ph": "X",
            "ts": round(event.start * 1e6, 1),
            "dur": round(max(event.end - event.start, 0) * 1e6, 1),
            "pid": process,
            "tid": thread,
        }

    def _named(self, what: str, process: int, thread: int, name: str) -> Iterable[dict[str, Any]]:
        metadata = {"ph": "M", "pid": process, "tid": thread}
        yield {**metadata, "name": f"{what}_name", "args": {"name": name}}
        yield {
            **metadata,
            "name": f"{what}_sort_index",
            "args": {"sort_index": thread if what == "thread" else process},
        }


def _open_end(path: Path) -> bool:
    """Cut off the bracket at the end of an existing file, and an incomplete record; return whether nothing is left."""
    if not os.path.lexists(path):
        return True
    with open_regular(path) as file:  # before it is opened for writing, which waits where it is a pipe
        if file.read(1) not in (b"", b"["):
            raise OSError(errno.EEXIST, "is there already and is no trace", str(path))
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(size - _TAIL_BYTES, 0)
        file.seek(start)
        tail = file.read()
        lines = tail.splitlines(keepends=True)
        while lines:
            line = lines[-1].rstrip(b",\r\n")
            if _whole(line):
                break
            lines.pop()
        kept = start + len(b"".join(lines).rstrip(b",\r\n"))
        file.truncate(kept if lines else 0)
    return not lines


def _whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
