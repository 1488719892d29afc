"""The reference policy of self-play, which is an earlier policy of the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rlcore.errors import CheckpointError
from rlcore_recipes.ranks import on_rank_zero
from rlcore_recipes.run.folder import OPPONENTS
from rlcore_recipes.run.session import Session

KEPT = 2
"""Opponents that are kept: a run may be resumed from a checkpoint of the iteration before."""


def renew_reference(session: Session[Any], number: int) -> None:
    """Make the policy of the beginning of step ``number``'s iteration the reference, unless it is already.

    The first step of an iteration writes it into the run's folder, which all processes of the actor must share; a
    resumed run reads it there.

    Raises:
        CheckpointError: it is not there any more, or cannot be read or written.
    """
    steps, ref = session.config.algorithm.iteration_steps, session.roles.ref
    if steps is None or ref is None:
        return
    begin = (number - 1) // steps * steps
    if begin == session.ref_version:
        return
    folder = session.config.trainer.out_dir.resolve() / OPPONENTS / f"step-{begin:06d}"
    with session.timed("opponent"):
        if number - 1 == begin:
            unfinished = folder.with_name(f"{folder.name}.partial")
            on_rank_zero(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            session.roles.actor.save(unfinished)
            on_rank_zero(lambda: _complete(unfinished, folder))
        elif not on_rank_zero(folder.is_dir):
            raise CheckpointError(
                f"{folder} is not there: step {begin + 1} wrote the opponent of its iteration there. Put it back, or "
                "start the run from its beginning in another trainer.out_dir"
            )
        ref.load(folder)
    session.ref_version = begin


def _complete(unfinished: Path, folder: Path) -> None:
    """Give the folder its name, and remove all but the newest ones."""
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    for old in sorted(folder.parent.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
