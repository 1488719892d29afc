"""Resume a run from a checkpoint, or start it from the beginning."""

from __future__ import annotations

import sys
import uuid

from rlcore.errors import CheckpointError
from rlcore_recipes.checkpoint import Checkpoint, CheckpointManager
from rlcore_recipes.ranks import executor, is_main, on_rank_zero
from rlcore_recipes.run.folder import Replaced, RunPlan, write_config, write_plan
from rlcore_recipes.run.trainable import Run

NAMED_KEYS = 10
"""Changed keys that are named."""


def resumed(run: Run) -> tuple[CheckpointManager, int, str]:
    """Load what the configuration says, and say how the run goes on.

    Returns:
        what saves and loads checkpoints, the steps done before, and the run's id.

    Raises:
        CheckpointError: no checkpoint is complete, it is of another kind of run, or new ones cannot be written.
    """
    trainer = run.session.config.trainer
    checkpoints = CheckpointManager(
        trainer.checkpoint_root,
        trainer.keep_checkpoints,
        best_metric=trainer.best_metric,
        best_mode=trainer.best_mode,
        ranks=executor,
        apply=run.session.executor.apply,
        parts={name: part.described_by for name, part in run.session.parts.items()},
    )
    found = checkpoints.resume_from(trainer.resume, run.session.engines)
    if found is None and not checkpoints.is_empty():
        raise CheckpointError(
            f"no checkpoint in {checkpoints.root} is complete (the warnings say why); move them away to start from the "
            "beginning"
        )
    if trainer.save_freq > 0:
        checkpoints.check_room(0 if found is None else found.state.step, run.session.total_steps)
    done, run_id = _loaded(run, checkpoints, found)

    def write() -> Replaced:
        replaced = write_config(trainer.out_dir, run.session.config, done)
        write_plan(trainer.out_dir, RunPlan(recipe=run.recipe, total_steps=run.session.total_steps))
        return replaced

    replaced = on_rank_zero(write)
    if is_main():
        if found is not None:
            print(_how(run, found), file=sys.stderr)
        if replaced.changed:
            how = "continuing" if done else "starting from the beginning"
            kept = f"; the metrics of the run before are in {replaced.kept}" if replaced.kept else ""
            print(f"{how} with other settings than before: {_listed(replaced.changed)}{kept}", file=sys.stderr)
    return checkpoints, done, run_id


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else ""
    return ", ".join(keys[:NAMED_KEYS]) + more


def _how(run: Run, found: Checkpoint) -> str:
    trainer, total_steps = run.session.config.trainer, run.session.total_steps
    if found.state.step < total_steps:
        return f"continuing after step {found.state.step} from {found.location.path}"
    key = "total_epochs" if trainer.total_steps is None else "total_steps"
    complete = f"the run in {trainer.out_dir} is complete: step {total_steps} was its last"
    return f"{complete}; raise trainer.{key} to train longer"


def _loaded(run: Run, checkpoints: CheckpointManager, found: Checkpoint | None) -> tuple[int, str]:
    """Load the checkpoint; the steps done before, and the run's id."""
    if found is None:
        return 0, new_run_id()
    saved = found.state
    try:
        _check_origin(run, found)
    except CheckpointError:
        checkpoints.release(found, run.session.engines)
        raise
    for name, part in run.session.parts.items():
        part.restore(saved.parts[name])
    checkpoints.load(found, run.session.engines)
    if run.resumed is not None:
        run.resumed(saved.step)
    return saved.step, saved.run_id if run.session.config.trainer.resume_tracking else new_run_id()


def new_run_id() -> str:
    """Return an id by which trackers know a run, the same on every rank."""
    return on_rank_zero(lambda: uuid.uuid4().hex[:12])


def _check_origin(run: Run, found: Checkpoint) -> None:
    """Refuse a checkpoint of another kind of run."""
    saved = found.state
    if saved.recipe != run.recipe:
        raise CheckpointError(f"{found.location.path} is of the recipe {saved.recipe}, not {run.recipe}")
    missing = [name for name in run.session.engines if name not in found.files]
    if missing or set(saved.parts) != set(run.session.parts):
        lacking = missing + sorted(set(saved.parts) ^ set(run.session.parts))
        raise CheckpointError(
            f"{found.location.path} was written under another configuration: it and this run differ in "
            f"{', '.join(lacking)}"
        )
