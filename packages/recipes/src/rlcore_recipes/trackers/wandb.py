"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from warnings import warn

import numpy as np

from rlcore.boundary import reason
from rlcore.config import Config
from rlcore.errors import RlcoreWarning
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers.settings import WandbSettings

STEP = "global_step"
OFFLINE = "the run is tracked offline, and `wandb sync` uploads it"


class WandbTracker(Tracker):
    """One wandb run, which a resumed run continues by its id, or by that in ``WANDB_RUN_ID``.

    A step is wandb's own step, which cannot go back, and the metric ``global_step``. Of the steps that a resumed run
    repeats, wandb keeps what was logged first.
    """

    def __init__(self, options: WandbSettings, run: RunInfo) -> None:
        import wandb

        self._wandb = wandb
        resume: Any = os.environ.get("WANDB_RESUME") or "allow"
        init = partial(
            wandb.init,
            project=options.project or run.project,
            entity=options.entity,
            group=options.group,
            tags=options.tags,
            name=run.name,
            id=os.environ.get("WANDB_RUN_ID") or (None if resume == "never" else run.run_id),
            resume=resume,
            dir=run.out_dir,
            config={**run.config, "versions": dict(run.versions)},
        )
        self._run = self._opened(init, options.mode or wandb.setup().settings.mode)
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def _opened(self, init: Callable[..., Any], mode: str) -> Any:
        """Return the run of ``mode``; an offline run where wandb cannot be reached."""
        if mode != "online":
            return init(mode=mode)
        try:
            if self._wandb.login(prompt=False, verify=False):
                return init(mode=mode)
            why = "there is no API key; `wandb login` saves one"
        except Exception as error:  # no network, a key that is not valid
            self._wandb.teardown()  # the id of the run that failed could not be used again
            why = reason(error)
        warn(f"Weights & Biases cannot be reached ({why}): {OFFLINE}", RlcoreWarning, stacklevel=2)
        return init(mode="offline")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of ``step``."""
        self._log(metrics, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        data = [[step, *row] for row in rows]
        self._log({name: self._wandb.Table(columns=["step", *columns], data=data, allow_mixed_types=True)}, step)

    def log_histogram(self, name: str, edges: Sequence[float], counts: Sequence[int], step: int) -> None:
        self._log({name: self._wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))}, step)

    def close(self) -> None:
        self._run.finish()

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if step >= self._run.starting_step:
            self._run.log({STEP: step, **values}, step=step)


def open_wandb(options: Config, run: RunInfo) -> Tracker:
    """Build the tracker ``wandb``."""
    assert isinstance(options, WandbSettings)
    return WandbTracker(options, run)
