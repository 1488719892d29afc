"""SwanLab."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from warnings import warn

from rlcore.boundary import reason
from rlcore.config import Config
from rlcore.errors import RlcoreWarning
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers.jsonl import logged_metrics
from rlcore_recipes.trackers.settings import SwanlabSettings

LOG_DIR = "SWANLAB_LOG_DIR"
OFFLINE = "the run is tracked offline, and `swanlab sync` uploads it"


class SwanlabTracker(Tracker):
    """One SwanLab run, which a resumed run continues by its id.

    SwanLab cannot add to a run of its local mode: there, a resumed run is an experiment that begins with the metrics of
    the steps before.
    """

    def __init__(self, options: SwanlabSettings, run: RunInfo) -> None:
        import swanlab

        self._swanlab = swanlab
        own = swanlab.Settings()
        mode, arguments = options.mode or own.mode, _arguments(options, run, own)
        swanlab.merge_settings({"interactive": False})  # a prompt for a key would wait in a thread without a terminal
        with _unchanged(LOG_DIR):
            try:
                self._run = swanlab.init(mode=mode, **arguments)
            except Exception as error:  # no key, no network
                if mode not in ("online", "cloud"):
                    raise
                warn(f"SwanLab cannot be reached ({reason(error)}): {OFFLINE}", RlcoreWarning, stacklevel=2)
                self._run = swanlab.init(mode="offline", **arguments)
        self._local = mode == "local"
        if self._local and run.start_step:
            for step, metrics in logged_metrics(run.out_dir, run.start_step):
                self.log(metrics, step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of ``step``."""
        self._run.log(dict(metrics), step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        texts = ["\n\n".join(f"{title}: {cell}" for title, cell in zip(columns, row)) for row in rows]
        if texts:
            captions = [str(number) for number in range(1, len(texts) + 1)]
            shown = [self._swanlab.Text(text, caption=caption) for text, caption in zip(texts, captions)]
            self._run.log({name: shown}, step=step)

    def log_histogram(self, name: str, edges: Sequence[float], counts: Sequence[int], step: int) -> None:
        if not self._local:  # its dashboard shows no charts but lines
            bars = self._swanlab.echarts.Bar().add_xaxis([f"{edge:.4g}" for edge in edges[:-1]])
            self._run.log({name: bars.add_yaxis("count", list(counts), category_gap=0)}, step=step)

    def close(self) -> None:
        if self._swanlab.has_run():
            self._run.finish()


@contextmanager
def _unchanged(variable: str) -> Iterator[None]:
    """Restore an environment variable; SwanLab's local mode sets that of its folder, also for later runs."""
    before = os.environ.get(variable)
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def _arguments(options: SwanlabSettings, run: RunInfo, own: Any) -> dict[str, Any]:
    """Return arguments for ``swanlab.init``; ``own`` is what SwanLab's variables and files say now."""
    own_folder = "log_dir" in own.model_fields_set or "SWANLAB_LOGDIR" in os.environ
    resume = own.run.resume if "SWANLAB_RESUME" in os.environ else "allow"
    return {
        "project": options.project or run.project,
        "workspace": options.workspace,
        "name": run.name,
        "id": own.run.id or (None if resume == "never" else run.run_id),  # which SwanLab refuses
        "resume": resume,
        "log_dir": str(options.log_dir or (own.log_dir if own_folder else run.out_dir / "swanlog")),
        "group": options.group,
        "tags": options.tags or None,
        "config": {**run.config, "versions": dict(run.versions)},
    }


def open_swanlab(options: Config, run: RunInfo) -> Tracker:
    """Build the tracker ``swanlab``."""
    assert isinstance(options, SwanlabSettings)
    return SwanlabTracker(options, run)
