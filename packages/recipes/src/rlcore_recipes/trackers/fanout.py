"""Many trackers as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from warnings import warn

from rlcore import plugins
from rlcore.boundary import reason
from rlcore.config import Config
from rlcore.errors import PluginError, RlcoreError, RlcoreWarning
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers.background import BackgroundTracker
from rlcore_recipes.trackers.settings import JsonlSettings

GROUP = "rlcore.trackers"
IMMEDIATE = ("console", "jsonl")
"""Trackers that the training thread calls itself; each of the others has a separate thread."""

WITHOUT_HISTOGRAMS = {"console", "jsonl", "parquet", "mlflow"}


def show_histograms(names: Iterable[str]) -> bool:
    """Return whether one of these trackers may show histograms."""
    return not WITHOUT_HISTOGRAMS.issuperset(names)


class Trackers(Tracker):
    """Passes everything on; a tracker that fails is warned about once and never ends the run."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)
        self._warned: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log ``metrics`` with every tracker."""
        self._each(lambda tracker: tracker.log(metrics, step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._each(lambda tracker: tracker.log_table(name, columns, rows, step))

    def log_histogram(self, name: str, edges: Sequence[float], counts: Sequence[int], step: int) -> None:
        self._each(lambda tracker: tracker.log_histogram(name, edges, counts, step))

    def progress(self, what: str, done: int, total: int, step: int) -> None:
        self._each(lambda tracker: tracker.progress(what, done, total, step))

    def close(self) -> None:
        for tracker in self._trackers.values():
            if isinstance(tracker, BackgroundTracker):
                tracker.finish()  # all of them before the first is waited for
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                call(tracker)
            except Exception as error:  # whatever a tracking service does, training goes on
                if name not in self._warned:
                    self._warned.add(name)
                    warn(
                        f"tracker {name} failed and may miss data: {reason(error)}",
                        RlcoreWarning,
                        stacklevel=3,
                    )


def open_trackers(sections: Mapping[str, Config], run: RunInfo) -> Trackers:
    """Start trackers, on the main process only.

    Args:
        sections: each tracker's own settings by its name; ``jsonl`` is started even if it is not among them.

    Raises:
        PluginError: a tracker's package is not installed. Any other failure to start is a warning.
    """
    for name, options in sections.items():
        for _, package in options.packages():
            if not package.installed:
                raise PluginError(f"the tracker {name} {package.advice}")
    trackers: dict[str, Tracker] = {}
    for name, options in {"jsonl": JsonlSettings(), **sections}.items():  # first jsonl, whose file others may read
        build = partial(plugins.get(GROUP, name).build, options, run)
        if name not in IMMEDIATE:
            trackers[name] = BackgroundTracker(name, build)
            continue
        try:
            trackers[name] = build()
        except RlcoreError:
            raise
        except Exception as error:
            warn(f"tracker {name} could not be started: {reason(error)}", RlcoreWarning, stacklevel=2)
    return Trackers(trackers)
