"""Fault tolerance: restart a run from its newest checkpoint after a worker died that cannot be replaced.

A trainer's processes live and die together. When one of them is gone, everything that the run started is ended and
built again, on what the cluster still has, and the run continues from its newest complete checkpoint. As steps depend
on nothing but the checkpoint, the seed and their number, it ends where it would have ended without the failure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from rlcore.config import Config
from rlcore.errors import PlacementError, RestartsExhausted, WorkerDied
from rlcore_recipes.checkpoint.storage import open_storage
from rlcore_recipes.run.folder import check_free
from rlcore_recipes.run.lock import claimed
from rlcore_recipes.run.output import output_may_end
from rlcore_recipes.settings import ControllerSettings, TrainerSettings

LONGEST_WAIT_S = 300.0


C = TypeVar("C", bound=Config)
"""A configuration with the sections ``trainer`` and ``controller``."""


def restarting(run: Callable[[C], None]) -> Callable[[C], None]:
    """Let ``run`` (a recipe's) start again from the newest checkpoint after a worker died that cannot be replaced.

    ``controller.max_restarts`` bounds restarts without a new checkpoint between them. Before each there is a wait of
    ``controller.restart_backoff_s``, which doubles from one to the next: a cluster that lost a node needs time to get
    another. Without checkpoints the run starts from its beginning.

    Raises:
        ConfigError: the output folder holds another run, or one that is under way.
        CheckpointError: checkpoints cannot be written where the configuration says.
        RestartsExhausted: a worker died once more after so many restarts.
    """

    def attempts(config: C, trainer: TrainerSettings, controller: ControllerSettings) -> None:
        newest, restarts, this = newest_checkpoint(trainer), 0, config
        while True:
            try:
                run(this)
                return
            except WorkerDied as error:
                why = _first_line(error)
            except PlacementError as error:
                if not restarts:  # it never fitted; later ones may have to wait for what was lost
                    raise
                why = _first_line(error)
            # out here nothing holds the engines, batches and connections of the failed attempt any more
            before, newest = newest, newest_checkpoint(trainer)
            restarts = 1 if newest != before else restarts + 1
            if restarts > controller.max_restarts:
                raise RestartsExhausted(exhausted(trainer, controller, newest, why))
            seconds = min(controller.restart_backoff_s * 2 ** (restarts - 1), LONGEST_WAIT_S)
            start = f"{trainer.checkpoint_root}/{newest}" if newest else _beginning(trainer)
            count = f"restart {restarts} of {controller.max_restarts}"
            print(f"{count} in {seconds:g} s, from {start}: {why}", file=sys.stderr, flush=True)
            time.sleep(seconds)
            this = config if newest is None else _resuming(config)

    @wraps(run)
    @output_may_end()
    def restarted(config: C) -> None:
        trainer, controller = _settings(config)
        with claimed(trainer.out_dir) as main:
            check_free(trainer, config)
            if main and trainer.save_freq > 0:
                open_storage(trainer.checkpoint_root).check_writable()
            attempts(config, trainer, controller)

    return restarted


def newest_checkpoint(trainer: TrainerSettings) -> str | None:
    """Return the name of the newest checkpoint of the run, complete or not."""
    names = open_storage(trainer.checkpoint_root).names()
    return names[-1] if names else None


def exhausted(trainer: TrainerSettings, controller: ControllerSettings, newest: str | None, why: str) -> str:
    """Return how often the run was restarted, why it ended, and how it can be continued."""
    tried = controller.max_restarts
    since = "without a new checkpoint in between " if tried > 1 else ""
    often = f"gave up after {tried} restart{'s' * (tried != 1)} {since}" if tried else "the run is not restarted "
    if newest is None:
        how = "there is no checkpoint to continue from"
        how += ": trainer.save_freq is -1" if trainer.save_freq < 0 else "; choose a smaller trainer.save_freq"
    elif trainer.resume == "auto":
        how = f"run the same command again to continue from {trainer.checkpoint_root}/{newest}"
    else:
        how = f"continue from {trainer.checkpoint_root}/{newest} with trainer.resume=auto"
    return f"{often}(controller.max_restarts={tried}): {why}\n{how}"


def _settings(config: Any) -> tuple[TrainerSettings, ControllerSettings]:
    return config.trainer, config.controller


def _resuming(config: C) -> C:
    """``config`` for going on from the run's own checkpoints, wherever it began."""
    trainer, _ = _settings(config)
    return config.model_copy(update={"trainer": trainer.model_copy(update={"resume": "auto"})})


def _beginning(trainer: TrainerSettings) -> str:
    return "the beginning" if trainer.resume in ("auto", "never") else trainer.resume


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
