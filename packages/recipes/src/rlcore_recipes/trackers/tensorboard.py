"""TensorBoard event files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlcore.config import Config
from rlcore.errors import PluginError
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers.settings import TensorboardSettings


class TensorboardTracker(Tracker):
    """Scalars by metric name, tables as text; a resumed run hides the steps it repeats."""

    def __init__(self, options: TensorboardSettings, run: RunInfo) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PluginError(
                "the tensorboard tracker needs the package 'tensorboard'; "
                "run: pip install 'rlcore-recipes[tensorboard]'"
            ) from error
        purge = run.start_step + 1 if run.start_step else None
        self._writer = SummaryWriter(str(run.out_dir / options.folder), purge_step=purge)
        if not run.start_step:
            self._writer.add_text("config", f"```json\n{json.dumps(dict(run.config), indent=2, default=str)}\n```", 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of ``step`` as scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), step)

    def close(self) -> None:
        self._writer.close()


def _cell(value: Any) -> str:
    """Return one line of Markdown that cannot end the table's cell."""
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def open_tensorboard(options: Config, run: RunInfo) -> Tracker:
    """Build the tracker ``tensorboard``."""
    assert isinstance(options, TensorboardSettings)
    return TensorboardTracker(options, run)
