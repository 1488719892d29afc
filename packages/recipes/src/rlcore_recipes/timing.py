"""Wall-clock time of the parts of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """``with timings("gen"): …`` adds to the seconds of "gen"."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def seconds(self, name: str) -> float:
        """What "name" has taken since the last `take`."""
        return self._seconds[name]

    def take(self) -> dict[str, float]:
        """All seconds since the last call, by name."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
