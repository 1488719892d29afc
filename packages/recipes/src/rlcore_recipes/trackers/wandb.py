"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlcore.config import Config
from rlcore.errors import PluginError
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers.settings import WandbSettings

STEP = "global_step"


class WandbTracker(Tracker):
    """One wandb run, which a resumed run continues by its id.

    The step is logged as a metric: wandb's internal step cannot go back, and a resumed run repeats steps.
    """

    def __init__(self, options: WandbSettings, run: RunInfo) -> None:
        try:
            import wandb
        except ImportError as error:
            raise PluginError(
                "the wandb tracker needs the package 'wandb'; run: pip install 'rlcore-recipes[wandb]'"
            ) from error
        self._table = wandb.Table
        self._run = wandb.init(
            project=options.project or run.project,
            entity=options.entity,
            mode=options.mode,
            group=options.group,
            tags=options.tags,
            name=run.name,
            id=run.run_id,
            resume="allow",
            dir=run.out_dir,
            config=dict(run.config),
        )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of ``step``."""
        self._run.log({STEP: step, **metrics})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        data = [[step, *row] for row in rows]
        self._run.log({STEP: step, name: self._table(columns=["step", *columns], data=data)})

    def close(self) -> None:
        self._run.finish()


def open_wandb(options: Config, run: RunInfo) -> Tracker:
    """Build the tracker ``wandb``."""
    assert isinstance(options, WandbSettings)
    return WandbTracker(options, run)
