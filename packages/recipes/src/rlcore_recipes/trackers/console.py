"""Progress and a table of steps on the terminal or in a notebook."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from rlcore.config import Config
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers.notebook import CellOutput
from rlcore_recipes.trackers.settings import ConsoleSettings

WIDTH = 9
HEADER_EVERY = 25
QUIET_S = 30.0
"""Seconds without a line after which the progress of a step is one, without a terminal."""


class ConsoleTracker(Tracker):
    """A line of a table per step and a progress bar; lines alone without a terminal or notebook, of long steps too."""

    def __init__(self, options: ConsoleSettings, run: RunInfo, console: Console | None = None) -> None:
        self._columns = options.columns | options.faults
        self._faults = options.faults
        self._run = run
        self._console = console or Console()
        self._started = time.monotonic()
        self._shown: list[str] = []
        self._rows = 0
        self._said = self._started
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._cell = CellOutput(run.name, run.total_steps, run.start_step) if self._console.is_jupyter else None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[eta]}"),
                TextColumn("{task.fields[now]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(
                run.name, total=run.total_steps, completed=run.start_step, eta="", now=""
            )
            self._progress.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Print the chosen metrics of ``step``."""
        eta = self._eta(step)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, eta=f"eta {eta}", now="")
        self._said = time.monotonic()
        present = [heading for heading, name in self._columns.items() if self._is_shown(heading, metrics.get(name))]
        if present:
            if not set(present) <= set(self._shown):
                known = {*self._shown, *present}
                self._shown = [heading for heading in self._columns if heading in known]
                self._rows = 0
            if self._rows % HEADER_EVERY == 0:
                self._print(["step", *self._shown, "eta"], "bold")
            self._rows += 1
            values = [metrics.get(self._columns[heading]) for heading in self._shown]
            cells = ["" if value is None else _short(value) for value in values]
            self._print([f"{step}/{self._run.total_steps}", *cells, eta])
        for name, value in metrics.items():
            if name.startswith(("val-core/", "val/")):
                self._line(f"step {step}  {name} = {_short(value)}", "green")
        if self._cell is not None:
            self._cell.advance(step, eta)

    def progress(self, what: str, done: int, total: int, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, now=f"{done}/{total} {what}")
        elif self._cell is not None:
            self._cell.show(f"{done}/{total} {what}")
        elif time.monotonic() - self._said >= QUIET_S:
            self._said = time.monotonic()
            self._line(f"step {step}/{self._run.total_steps}: {done} of {total} {what}")

    def _is_shown(self, heading: str, value: float | None) -> bool:
        return value is not None and (value != 0 or heading not in self._faults)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, cells: list[str], style: str = "") -> None:
        self._line(" ".join(f"{cell:>{WIDTH}}" for cell in cells), style)

    def _line(self, text: str, style: str = "") -> None:
        if self._cell is not None:
            self._cell.add(text)
        else:
            self._console.print(Text(text, style=style), soft_wrap=True)

    def _eta(self, step: int) -> str:
        done = step - self._run.start_step
        if done <= 0:
            return ""
        left = (time.monotonic() - self._started) / done * (self._run.total_steps - step)
        return str(timedelta(seconds=round(left)))


def _short(value: float) -> str:
    """About four significant digits, in at most nine characters."""
    if abs(value) >= 1e6 or value != value:
        return f"{value:.3g}"
    if value == int(value):
        return str(int(value))
    return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def open_console(options: Config, run: RunInfo) -> Tracker:
    """Build the tracker ``console``."""
    assert isinstance(options, ConsoleSettings)
    return ConsoleTracker(options, run)
