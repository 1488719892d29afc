"""The policy as it was at the start of the run, to train from it again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rlcore.errors import CheckpointError
from rlcore_recipes.ranks import on_rank_zero
from rlcore_recipes.run.folder import FIRST_WEIGHTS
from rlcore_recipes.run.session import Session


def restart_policy(session: Session[Any], number: int) -> None:
    """Give the actor the weights, optimizer and schedule of the start of the run, if ``algorithm.restart`` is set.

    The first step writes them into the run's folder, which all processes of the actor must share.

    Raises:
        CheckpointError: they are not there any more, or cannot be read or written.
    """
    if not session.config.algorithm.restart:
        return
    actor, folder = session.roles.actor, session.config.trainer.out_dir.resolve() / FIRST_WEIGHTS
    with session.timed("restart"):
        if number == 1:
            unfinished = folder.with_name(f"{folder.name}.partial")
            on_rank_zero(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            actor.save(unfinished)
            on_rank_zero(lambda: _rename(unfinished, folder))
        elif on_rank_zero(folder.is_dir):
            actor.load(folder)
        else:
            raise CheckpointError(
                f"{folder} is not there: the first step wrote the weights there that algorithm.restart=true trains "
                "from. Put it back, or start the run from its beginning in another trainer.out_dir"
            )


def _rename(unfinished: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
