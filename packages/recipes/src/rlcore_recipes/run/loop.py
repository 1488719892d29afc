"""The loop around a recipe's step: validation, checkpoints, resuming, tracking, stopping."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from warnings import warn

import torch

from rlcore.boundary import boundary
from rlcore.errors import ConfigError, RlcoreWarning
from rlcore.progress import listening
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.checkpoint import CheckpointManager, RunState
from rlcore_recipes.ranks import all_gather, is_main, on_rank_zero
from rlcore_recipes.run.banner import print_end, print_start
from rlcore_recipes.run.folder import MODEL
from rlcore_recipes.run.health import Health
from rlcore_recipes.run.resume import resumed
from rlcore_recipes.run.seeds import seed_generators
from rlcore_recipes.run.stopping import exit_code, stop_asked_for, stop_signals
from rlcore_recipes.run.system_metrics import system_metrics
from rlcore_recipes.run.trainable import Run
from rlcore_recipes.run.versions import code_versions
from rlcore_recipes.trackers import open_trackers


def train(run: Run) -> None:
    """Make all steps of ``run``, from the beginning or from its checkpoint.

    SIGTERM, SIGHUP and SIGINT end it after the step under way, with a checkpoint (see `exit_code`).

    Raises:
        TrainingError: rewards failed, or updates were skipped, for too long.
    """
    session = run.session
    trainer, total_steps = session.config.trainer, session.total_steps
    checkpoints, done, run_id = resumed(run)
    complete = done >= total_steps
    if not complete:
        print_start(run.recipe, session.about(), trainer, done, total_steps)
    health = Health(trainer, session.max_error_ratio, session.max_invalid_ratio, session.records.invalid)
    with (
        tracking(run, run_id, done) as tracker,
        system_metrics(trainer.system_metrics_s if is_main() else None) as machine,
        stop_signals(trainer.grace_s, checkpoints) as received,
        completing(checkpoints, alone=len(all_gather(None)) == 1),
    ):
        if done == 0 and run.validate is not None and trainer.val_before_train:
            metrics = validated(run, tracker, 0)
            tracker.log(metrics, 0)
            health.check_validation(metrics)
        while done < total_steps:
            done += 1
            metrics = timed_step(run, tracker, done)
            last, stop = done == total_steps, stop_asked_for(received)
            if run.validate is not None and due(trainer.test_freq, done, last):
                metrics |= validated(run, tracker, done)
            # logged first: a run killed while it saves repeats the step, one killed after it does not log it again
            metrics |= timings(run, metrics)
            session.records.hand_over(tracker, done)
            tracker.log(metrics | machine(), done)
            # before the checkpoint: after that of the last step, the same command would call the run complete
            health.check(metrics, last)
            if trainer.save_freq > 0:
                with session.timed("save_checkpoint"):  # reported with the next step
                    checkpoints.poll()
                    if due(trainer.save_freq, done, last or stop is not None):
                        saved = state(run, done, run_id)
                        checkpoints.start(done, session.engines, saved, metrics, background=trainer.async_save)
                    if last or stop is not None or not trainer.async_save:
                        checkpoints.finish()
            if stop is not None and not last:
                raise SystemExit(exit_code(stop, trainer, done, total_steps))
        if trainer.save_hf:
            export(run, trainer.out_dir / MODEL)
    if trainer.save_hf or not complete:
        print_end(trainer, total_steps)


def timed_step(run: Run, tracker: Tracker, number: int) -> dict[str, float]:
    """Make step ``number``; return its metrics with time, memory and throughput."""
    seed_generators(run.session.config.seed, number)
    with run.session.timed("step"), showing(tracker, number):
        metrics = run.step(number)
    seconds = run.session.timed.seconds("step")
    metrics |= {"training/global_step": number, "perf/time_per_step": seconds, **memory()}
    metrics["perf/throughput"] = metrics["perf/total_num_tokens"] / seconds / run.session.engines["actor"].dp_size
    return metrics


def timings(run: Run, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each part, and of the step's parts the milliseconds per token of its batch."""
    seconds = run.session.timed.take()
    tokens = max(metrics["perf/total_num_tokens"], 1.0)
    found = {f"timing_s/{name}": value for name, value in seconds.items()}
    return found | {
        f"timing_per_token_ms/{name}": value * 1000 / tokens
        for name, value in seconds.items()
        if name not in ("step", "testing", "save_checkpoint")
    }


def validated(run: Run, tracker: Tracker, step: int) -> dict[str, float]:
    """Validate after ``step``; log the completions, return the metrics."""
    assert run.validate is not None
    with run.session.timed("testing"), showing(tracker, step):
        outcome = run.validate()
    best = run.session.config.trainer.best_metric
    if best is not None and best.startswith("val") and best not in outcome.metrics:
        close = get_close_matches(best, outcome.metrics, n=3) or list(outcome.metrics)
        raise ConfigError(f"trainer.best_metric={best} is not a validation metric; did you mean {' or '.join(close)}?")
    if outcome.rows:
        tracker.log_table("val/generations", outcome.columns, outcome.rows, step)
    return outcome.metrics


@contextmanager
def showing(tracker: Tracker, step: int) -> Iterator[None]:
    """Show how far the step has come."""
    with listening(lambda what, done, total: tracker.progress(what, done, total, step)):
        yield


def due(every: int, step: int, last: bool) -> bool:
    """Return whether something is due after ``step`` that happens every so many steps, and after the last one."""
    return every > 0 and (last or step % every == 0)


def memory() -> dict[str, float]:
    """Peak memory of this process in GiB: its resident size, and what torch had of the GPU."""
    per_gib = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    found = {"perf/max_cpu_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_gib}
    if torch.cuda.is_available():
        found["perf/max_memory_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["perf/max_memory_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return found


# --- checkpoints ----------------------------------------------------------------------------------------------------


def state(run: Run, step: int, run_id: str) -> RunState:
    """Return what a checkpoint after ``step`` holds besides the engines."""
    parts = {name: part.state() for name, part in run.session.parts.items()}
    return RunState(recipe=run.recipe, step=step, run_id=run_id, parts=parts)


@contextmanager
def completing(checkpoints: CheckpointManager, alone: bool) -> Iterator[None]:
    """Complete the checkpoint under way also if a step fails.

    Args:
        alone: no other process runs this program. If others do, one that failed cannot know where they are, and must
            not wait for them.
    """
    try:
        yield
    except Exception:
        if alone:
            try:
                checkpoints.finish()
            except Exception as error:
                warn(f"the checkpoint under way is lost: {error}", RlcoreWarning, stacklevel=2)
        raise


def export(run: Run, folder: Path) -> None:
    """Write the policy and its tokenizer into ``folder``."""
    run.session.engines["actor"].save_pretrained(folder)

    def save_tokenizer() -> None:
        with boundary(f"the model is in {folder}, but its tokenizer (copy that of model.path) cannot be written there"):
            run.session.save_tokenizer(folder)

    on_rank_zero(save_tokenizer)


# --- tracking -------------------------------------------------------------------------------------------------------


class _Silent(Tracker):
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        return


@contextmanager
def tracking(run: Run, run_id: str, done: int) -> Iterator[Tracker]:
    """Open the run's trackers; on other ranks than the main one, a tracker that does nothing."""
    if not is_main():
        yield _Silent()
        return
    config, trainer = run.session.config, run.session.config.trainer
    info = RunInfo(
        out_dir=trainer.out_dir,
        project=trainer.project,
        name=trainer.name or trainer.out_dir.resolve().name,
        run_id=run_id,
        total_steps=run.session.total_steps,
        config=config.model_dump(mode="json"),
        start_step=done,
        versions=code_versions(),
    )
    tracker = open_trackers({name: trainer.options_of(name) for name in trainer.trackers}, info)
    try:
        yield tracker
    finally:
        tracker.close()
