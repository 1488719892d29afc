"""The host's ends of a sandbox's pipes, read within bounds and in time."""

from __future__ import annotations

import json
import os
import selectors
import time
from typing import Any

CHUNK = 1 << 16
LONGEST_REPORT = 4096
GONE: dict[str, Any] = {}
"""In place of a report: the sandbox has ended without one, or what it reported is no report."""


class Output:
    """What a sandbox printed, up to ``limit`` bytes of each of its two streams; ``cut`` counts the others."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = (bytearray(), bytearray())
        self.cut = 0

    def read(self, descriptor: int, stream: int) -> bool:
        """Read what is there; return False if the stream has ended or is empty."""
        try:
            read = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return False
        kept = read[: self._limit - len(self._kept[stream])]
        self._kept[stream].extend(kept)
        self.cut += len(read) - len(kept)
        return bool(read)

    def text(self, stream: int) -> str:
        """Return the text of standard output (0) or standard error (1)."""
        return self._kept[stream].decode(errors="replace")


class Pipes:
    """The host's ends: ``requests`` is written, ``streams`` (standard output and error) and ``reports`` are read."""

    def __init__(self, requests: int, streams: tuple[int, int], reports: int) -> None:
        self._requests, self._streams, self._reports = requests, streams, reports
        self._report = b""
        for descriptor in (requests, *streams, reports):
            os.set_blocking(descriptor, False)

    def exchange(self, request: bytes, output: Output, timeout_s: float) -> dict[str, Any] | None:
        """Send ``request`` and collect ``output`` until a report, which is returned; None: there was none in time."""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for descriptor in (*self._streams, self._reports):
                selector.register(descriptor, selectors.EVENT_READ)
            if request:
                selector.register(self._requests, selectors.EVENT_WRITE)
            while (left := deadline - time.monotonic()) > 0:
                for descriptor in [key.fd for key, _ in selector.select(left)]:
                    if descriptor == self._requests:
                        request = _written(descriptor, request)
                        if not request:
                            selector.unregister(descriptor)
                    elif descriptor == self._reports:
                        if (report := self._next_report()) is not None:
                            self._collect(output)
                            return report
                    elif not output.read(descriptor, self._streams.index(descriptor)):
                        selector.unregister(descriptor)
        return None

    def _collect(self, output: Output) -> None:
        """Read what was printed before the report; not for ever, where a process of the sandbox still prints."""
        for stream, descriptor in enumerate(self._streams):
            for _ in range(LONGEST_REPORT):
                if not output.read(descriptor, stream):
                    break

    def _next_report(self) -> dict[str, Any] | None:
        """Return the next report; None if it is not complete."""
        try:
            read = os.read(self._reports, LONGEST_REPORT)
        except BlockingIOError:
            return None
        line, end, self._report = (self._report + read).partition(b"\n")
        if not end:
            self._report = line
            return None if read and len(line) < LONGEST_REPORT else GONE
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
            return GONE
        return report if isinstance(report, dict) else GONE


def _written(descriptor: int, data: bytes) -> bytes:
    """Write as much of ``data`` as fits, and return the rest."""
    try:
        return data[os.write(descriptor, data[:CHUNK]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:  # the sandbox has ended, which its pipe of reports says
        return b""
