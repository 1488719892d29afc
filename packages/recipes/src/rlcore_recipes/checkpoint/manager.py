"""`CheckpointManager`: saves, finds and restores the checkpoints of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar
from warnings import warn

from rlcore.controller import LocalExecutor
from rlcore.engines import TrainEngine
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError, RlcoreWarning
from rlcore_kit.checkpoint.background_thread import in_background
from rlcore_kit.checkpoint.json_file import JsonFile
from rlcore_recipes.checkpoint import engine_side
from rlcore_recipes.checkpoint.manifest import STATE, RunState, decode_state
from rlcore_recipes.checkpoint.naming import CheckpointLocation, name_of, normal, step_of
from rlcore_recipes.checkpoint.retention import best, outdated
from rlcore_recipes.checkpoint.storage import Storage, open_storage

T = TypeVar("T")
Engines = Mapping[str, TrainEngine]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        files: what each engine's part consists of, by role.
        state: the plain values that were saved with it.
    """

    location: CheckpointLocation
    files: Mapping[str, Mapping[str, FileRecord]]
    state: RunState


class _Stage(Enum):
    WRITING = "the engines write"
    UPLOADING = "the engines' processes upload"
    PUBLISHING = "the main process completes it and deletes old ones"


@dataclass
class _Saving:
    """The checkpoint under way."""

    step: int
    location: CheckpointLocation
    engines: Engines
    state: bytes
    metrics: dict[str, float]
    files: dict[str, FileRecord]
    stage: _Stage = _Stage.WRITING
    publishing: Future[None] | None = None  # on the main process


class CheckpointManager:
    """The checkpoints of one run, named ``step-N`` below ``root``.

    With several processes under one program (torchrun) all of them make every call. With a driver whose engines live
    in other processes only the driver does. A local ``root`` is a folder that all processes share; a URL needs no
    shared disk.

    Args:
        root: a folder, or a URL that fsspec reaches.
        keep: newest checkpoints that stay; None: all.
        best_metric: the best checkpoint by this metric stays too.
        ranks: the processes that make the calls.
        apply: runs a function in all processes of an engine (an executor's ``apply``); by default that of ``ranks``.
        parts: what describes the entries of a state's ``parts`` by name; what does not fit is a damaged checkpoint.

    Raises:
        CheckpointError: the URL cannot be used; the message says what to install.
    """

    def __init__(
        self,
        root: str | Path,
        keep: int | None = 2,
        *,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        ranks: LocalExecutor | None = None,
        apply: Callable[..., list[Any]] | None = None,
        parts: Mapping[str, type[JsonFile]] | None = None,
    ) -> None:
        self.root = normal(root)
        self._keep = keep
        self._best_metric = best_metric
        self._sign = 1 if best_mode == "max" else -1
        self._ranks = ranks or LocalExecutor()
        self._apply = apply or self._ranks.apply
        self._parts = parts or {}
        self._storage: Storage = open_storage(self.root)
        self._damaged: set[str] = set()
        self._saving: _Saving | None = None
        self.newest: str | None = None  # where the newest complete checkpoint is that this process knows of
        self._on_main(self._storage.clean_up, "clean_up_checkpoints")

    # --- saving --------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        engines: Engines,
        state: RunState,
        metrics: Mapping[str, float] | None = None,
    ) -> str:
        """Write the checkpoint of ``step``, delete those that are no longer kept, and return its location.

        Raises:
            CheckpointError: see `start`.
        """
        self.start(step, engines, state, metrics, background=False)
        self.finish()
        return f"{self.root}/{name_of(step)}"

    def start(
        self,
        step: int,
        engines: Engines,
        state: RunState,
        metrics: Mapping[str, float] | None = None,
        *,
        background: bool = True,
    ) -> None:
        """Begin to write the checkpoint of ``step``; what follows does not change what is written.

        It becomes a checkpoint in a later `poll` or `finish`. One that was begun before is finished first.

        Args:
            engines: worker groups by role, whose processes write their parts.
            state: plain values; the main process's are stored.
            metrics: the step's metrics, of which ``best_metric`` is remembered.
            background: False: the engines save in the foreground.

        Raises:
            CheckpointError: writing failed in some process, or the name is taken by something else; earlier
                checkpoints are as they were.
        """
        self.finish()
        location = CheckpointLocation(self.root, name_of(step))
        chosen = {
            name: float(value)
            for name, value in (metrics or {}).items()
            if name == self._best_metric and math.isfinite(value)
        }
        saving = _Saving(step, location, dict(engines), state.encoded(), chosen, {})
        self._on_main(lambda: self._storage.begin(location.name), f"begin_checkpoint {step}")
        self._saving = saving
        self._or_abandon(lambda: self._to_engines(engine_side.save_part, location, background=background))

    def poll(self) -> None:
        """Complete the checkpoint under way if all processes have written their parts; wait for nothing.

        Raises:
            CheckpointError: see `start`.
        """
        while self._saving is not None and self._or_abandon(self._stage_is_over):
            self._or_abandon(self._end_stage)

    def finish(self) -> None:
        """Wait for the checkpoint under way, if any, and complete it.

        Raises:
            CheckpointError: see `start`.
        """
        while self._saving is not None:
            self._or_abandon(self._end_stage)

    def _stage_is_over(self) -> bool:
        saving = self._saving
        assert saving is not None
        if saving.stage is _Stage.WRITING:
            return all(all(self._apply(engine, engine_side.part_is_written)) for engine in saving.engines.values())
        if saving.stage is _Stage.UPLOADING:
            return all(self._to_engines(engine_side.part_is_uploaded, saving.location))
        return self._on_main(lambda: saving.publishing is None or saving.publishing.done(), "checkpoint_published")

    def _end_stage(self) -> None:
        """Wait for what the present stage waits for, and go on to the next."""
        saving = self._saving
        assert saving is not None
        if saving.stage is _Stage.PUBLISHING:
            self._on_main(lambda: saving.publishing and saving.publishing.result(), f"publish_checkpoint {saving.step}")
            self.newest = saving.location.path
            self._damaged.discard(saving.location.name)
            self._saving = None
            return
        gather = engine_side.finish_part if saving.stage is _Stage.WRITING else engine_side.finish_upload
        for records in self._to_engines(gather, saving.location):
            saving.files.update(records)
        if saving.stage is _Stage.WRITING and saving.location.remote:
            saving.stage = _Stage.UPLOADING
            return
        saving.stage = _Stage.PUBLISHING
        if self._ranks.is_main:
            saving.publishing = in_background(lambda: self._publish(saving), "publish-checkpoint")

    def _publish(self, saving: _Saving) -> None:
        """Publish the checkpoint: in a thread of the main process."""
        self._storage.publish(saving.location.name, saving.step, saving.metrics, saving.files, saving.state)
        steps = {step_of(name) for name in self._storage.names() if name not in self._damaged - {saving.location.name}}
        for step in outdated(self._complete(steps), self._scores(), saving.step, self._keep):
            try:
                self._storage.delete(name_of(step))
            except CheckpointError as error:
                warn(str(error), RlcoreWarning, stacklevel=2)

    def _or_abandon(self, action: Callable[[], T]) -> T:
        """``action``; if it fails, what was written of the checkpoint under way is deleted."""
        try:
            return action()
        except Exception:
            saving, self._saving = self._saving, None
            assert saving is not None
            if self._ranks.is_main:
                self._storage.abandon(saving.location.name)
            raise

    def check_room(self, done: int, last: int) -> None:
        """See, before work is done, whether the names of checkpoints after ``done`` steps, up to ``last``, are free.

        Raises:
            CheckpointError: something else has a name that the run will need.
        """

        def check() -> None:
            for name in self._storage.taken():
                if done < step_of(name) <= last:
                    self._storage.check_replaceable(name)

        self._on_main(check, "check_room_for_checkpoints")

    # --- finding -------------------------------------------------------------------------------------------------

    def latest(self, engines: Engines | None = None) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None; damaged ones are passed over with a warning.

        Args:
            engines: from a URL, their processes fetch their parts of the checkpoint, which checks the contents, and
                hold them for `load`. Without engines only sizes are compared there.
        """
        for name in reversed(self._on_main(self._storage.names, "list_checkpoints")):
            location = CheckpointLocation(self.root, name)
            try:
                return self._open(location, self._storage, engines or {})
            except CheckpointError as error:
                self._damaged.add(name)
                if self._ranks.is_main:
                    warn(f"skipped a damaged checkpoint: {error}", RlcoreWarning, stacklevel=2)
        return None

    def best(self) -> str | None:
        """Return where the checkpoint is that is best by ``best_metric``, if any."""
        step = self._on_main(lambda: best(self._scores()), "best_checkpoint")
        return None if step is None else f"{self.root}/{name_of(step)}"

    def is_empty(self) -> bool:
        """Return whether nothing is named like a checkpoint, complete or not."""
        return not self._on_main(self._storage.names, "list_checkpoints")

    def resume_from(self, choice: str, engines: Engines | None = None) -> Checkpoint | None:
        """Return the checkpoint to go on from, None to start afresh.

        Args:
            choice: "auto" (the newest complete one), "never", or a checkpoint's folder or URL.
            engines: see `latest`.

        Raises:
            CheckpointError: the chosen one is missing or damaged, or the run would mix with later checkpoints that are
                in ``root`` already.
        """
        if choice == "auto":
            found = self.latest(engines)
            self.newest = None if found is None else found.location.path
            return found
        location = None if choice == "never" else CheckpointLocation.of(choice)
        newer = self._on_main(self._storage.names, "list_checkpoints")
        if location is not None and location.root == self.root:
            newer = [name for name in newer if step_of(name) > step_of(location.name)]
        if newer:
            if location is not None:
                self._open(location, open_storage(location.root), {})
            raise CheckpointError(
                f"{self.root}/{newer[-1]} belongs to an earlier run that resume={choice} does not continue; choose "
                "another output folder, move it away, or set resume=auto"
            )
        if location is None:
            return None
        found = self._open(location, open_storage(location.root), engines or {})
        self.newest = found.location.path
        return found

    def load(self, found: Checkpoint, engines: Engines) -> None:
        """Restore ``engines`` from a checkpoint that `latest` or `resume_from` found for them."""
        for role, engine in engines.items():
            self._apply(engine, engine_side.load_part, found.location, role, found.files[role])
        self.release(found, engines)

    def release(self, found: Checkpoint, engines: Engines) -> None:
        """Delete what the engines' processes fetched of a checkpoint at a URL; `load` does so itself."""
        for role, engine in engines.items() if found.location.remote else ():
            if role in found.files:
                self._apply(engine, engine_side.discard_part, found.location, role, found.files[role])

    def _open(self, location: CheckpointLocation, storage: Storage, engines: Engines) -> Checkpoint:
        """Open the checkpoint; raise CheckpointError on all processes if it is missing or damaged."""

        def read() -> tuple[dict[str, FileRecord], RunState]:
            storage.check(location.name)
            manifest = storage.manifest(location.name)
            state = decode_state(storage.read(location.name, STATE), manifest, self._parts, location.path)
            return manifest.files, state

        files, state = self._on_main(read, f"check_checkpoint {location.name}")
        by_role: dict[str, dict[str, FileRecord]] = {}
        for name, record in files.items():
            if "/" in name:
                by_role.setdefault(name.partition("/")[0], {})[name] = record
        found = Checkpoint(location, by_role, state)
        if location.remote:
            try:
                for role, engine in engines.items():
                    if role in by_role:
                        self._apply(engine, engine_side.fetch_part, location, role, by_role[role])
            except CheckpointError:
                self.release(found, engines)
                raise
        return found

    # --- on the main process -------------------------------------------------------------------------------------

    def _complete(self, steps: set[int]) -> list[int]:
        """Return the steps whose checkpoints have a manifest."""
        found = []
        for step in steps:
            try:
                self._storage.manifest(name_of(step))
            except CheckpointError:
                continue
            found.append(step)
        return found

    def _scores(self) -> dict[int, float]:
        """Return how good checkpoints are, larger being better, where that is known."""
        found: dict[int, float] = {}
        for name in self._storage.names() if self._best_metric is not None else ():
            try:
                value = self._storage.manifest(name).metrics.get(self._best_metric or "")
            except CheckpointError:
                continue
            if value is not None and math.isfinite(value) and name not in self._damaged:
                found[step_of(name)] = self._sign * value
        return found

    # --- spreading calls -----------------------------------------------------------------------------------------

    def _on_main(self, work: Callable[[], T], name: str) -> T:
        return self._ranks.on_main(work, name)

    def _to_engines(self, function: Callable[..., T], location: CheckpointLocation, **options: Any) -> list[T]:
        """``function(engine, location, role, ...)`` in every process of every engine under way."""
        assert self._saving is not None
        results: list[T] = []
        for role, engine in self._saving.engines.items():
            results += self._apply(engine, function, location, role, *options.values())
        return results
