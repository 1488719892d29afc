"""Checkpoints of a whole run: atomic, verified, rotating.

Invariants: a folder ``step-N`` with a manifest is complete, because it is written under another name, flushed to disk,
and renamed last; and nothing but this module's own folders is ever moved or deleted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from warnings import warn

from rlcore.controller import LocalExecutor
from rlcore.errors import CheckpointError, RlcoreWarning

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"step-\d{6,}")
_LEFTOVER = re.compile(r"step-\d{6,}\.(tmp|old)")


class CheckpointManager:
    """The checkpoints of one run, in folders ``step-N`` below ``root``.

    With several processes (torchrun), which share ``root``, all of them make every call.

    Args:
        keep: newest checkpoints that stay.
        best_metric: the best checkpoint by this metric stays too.
        ranks: the processes that take part.
    """

    def __init__(
        self,
        root: Path,
        keep: int = 2,
        *,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        ranks: LocalExecutor | None = None,
    ) -> None:
        self.root = root
        self._keep = keep
        self._best_metric = best_metric
        self._sign = 1 if best_mode == "max" else -1
        self._ranks = ranks or LocalExecutor()
        self._damaged: set[Path] = set()
        self._ranks.on_main(self._clean_up, "clean_up_checkpoints")

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Write the checkpoint of ``step`` and delete those that are no longer kept.

        Args:
            write: puts files into the folder it is given; called on every process with the same folder.
            state: plain values (JSON), read again by `load_state`; the main process's are stored.
            metrics: the step's metrics, of which ``best_metric`` is remembered.

        Raises:
            CheckpointError: writing failed on some process, or the folder's name is taken by something else; earlier
                checkpoints are as they were.
        """
        final = self.root / f"step-{step:06d}"
        temporary = final.with_name(f"{final.name}.tmp")
        name = f"save_checkpoint {step}"
        self._ranks.on_main(lambda: _make_room(final, temporary), name)
        try:
            self._on_all_ranks(lambda: write(temporary), f"cannot write {final}", name)
            self._ranks.on_main(lambda: self._commit(step, temporary, final, state, metrics or {}), name)
        except Exception:
            if self._ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, or None; damaged ones are passed over with a warning."""
        return self._ranks.on_main(self._latest, "latest_checkpoint")

    def best(self) -> Path | None:
        """The checkpoint that is best by ``best_metric``, if any."""
        return self._ranks.on_main(self._best, "best_checkpoint")

    def resume_from(self, choice: str) -> Path | None:
        """The checkpoint to go on from, None to start afresh. ``choice`` is "auto" (the newest whole one),
        "never", or a checkpoint's folder.

        Raises:
            CheckpointError: the chosen one is missing or damaged, or the run would mix with later checkpoints that are
                in ``root`` already.
        """
        return self._ranks.on_main(lambda: self._resume_from(choice), "resume_from")

    def _resume_from(self, choice: str) -> Path | None:
        if choice == "auto":
            return self._latest()
        start = None
        if choice != "never":
            start = Path(choice).expanduser()
            verify(start)
        newer = [path for path in self._checkpoints() if start is None or path.resolve() != start.resolve()]
        if start is not None and start.resolve().parent == self.root.resolve():
            newer = [path for path in newer if _step(path) > _step(start)]
        if newer:
            raise CheckpointError(
                f"{newer[-1]} belongs to an earlier run that resume={choice} does not continue; choose another output "
                "folder, move it away, or set resume=auto"
            )
        return start

    def _latest(self) -> Path | None:
        for path in reversed(self._checkpoints()):
            try:
                verify(path)
            except CheckpointError as error:
                self._damaged.add(path)
                warn(f"skipped a damaged checkpoint: {error}", RlcoreWarning, stacklevel=2)
            else:
                return path
        return None

    def _best(self) -> Path | None:
        scored = [
            (score, _step(path), path) for path in self._checkpoints() if (score := self._score(path)) is not None
        ]
        return max(scored)[-1] if scored else None

    def _score(self, path: Path) -> float | None:
        """How good a checkpoint is, larger being better; None if that is not known."""
        if self._best_metric is None or path in self._damaged:
            return None
        try:
            value = _read_manifest(path)["metrics"].get(self._best_metric)
        except CheckpointError:
            return None
        return None if value is None or math.isnan(value) else self._sign * value

    def _commit(
        self, step: int, temporary: Path, final: Path, state: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        old = final.with_name(f"{final.name}.old")
        try:
            (temporary / STATE).write_text(json.dumps(dict(state)))
            files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
            with ThreadPoolExecutor(4) as pool:
                records = list(pool.map(_flush_and_hash, files))
            manifest = {
                "format": FORMAT,
                "step": step,
                "metrics": {name: float(metrics[name]) for name in metrics if name == self._best_metric},
                "files": {path.relative_to(temporary).as_posix(): record for path, record in zip(files, records)},
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            _flush(temporary / MANIFEST)
            for folder in {Path(), *(parent for path in files for parent in path.relative_to(temporary).parents)}:
                _flush(temporary / folder)
            if final.exists():
                os.rename(final, old)
            os.rename(temporary, final)
            _flush(self.root)
        except OSError as error:
            if old.exists() and not final.exists():
                os.rename(old, final)
            raise CheckpointError(f"cannot write {final}: {error}") from error
        shutil.rmtree(old, ignore_errors=True)
        self._damaged.discard(final)
        self._rotate(step)

    def _rotate(self, step: int) -> None:
        ours = [path for path in self._checkpoints() if (path / MANIFEST).is_file() and path not in self._damaged]
        until_now = [path for path in ours if _step(path) <= step]
        for path in set(until_now[: -self._keep]) - {self._best()}:
            # renamed first: a crash while deleting leaves nothing that looks like a checkpoint
            doomed = path.with_name(f"{path.name}.tmp")
            try:
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                warn(f"cannot delete the old checkpoint {path}: {error}", RlcoreWarning, stacklevel=2)

    def _checkpoints(self) -> list[Path]:
        """Folders named like checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted((path for path in self.root.iterdir() if _NAME.fullmatch(path.name)), key=_step)

    def _clean_up(self) -> None:
        """Finish what a crash interrupted: delete unfinished folders, put back one that was being replaced."""
        for path in list(self.root.iterdir()) if self.root.is_dir() else []:
            if not _LEFTOVER.fullmatch(path.name):
                continue
            final = path.with_suffix("")
            if path.suffix == ".old" and not final.exists():
                os.rename(path, final)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def _on_all_ranks(self, action: Callable[[], None], what: str, name: str) -> None:
        """Run ``action`` on every process; an error on any of them is raised on all."""
        caught: Exception | None = None
        try:
            action()
        except Exception as error:
            caught = error
        problems = self._ranks.all_gather(caught and f"{type(caught).__name__}: {caught}", name)
        if isinstance(caught, OSError):
            raise CheckpointError(f"{what}: {caught}") from caught
        if caught is not None:
            raise caught
        for rank, text in enumerate(problems):
            if text is not None:
                raise CheckpointError(f"{what}: rank {rank} failed: {text}")


def verify(path: Path) -> None:
    """Check that ``path`` holds what was written.

    Raises:
        CheckpointError: names the first thing that is missing or differs.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    files: dict[str, dict[str, Any]] = _read_manifest(path)["files"]
    for name, record in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {name}")
        if file.stat().st_size != record["size"]:
            raise CheckpointError(f"{path}: {name} has {file.stat().st_size} bytes instead of {record['size']}")
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(_hash, [path / name for name in files])
        for (name, record), found in zip(files.items(), hashes):
            if found != record["sha256"]:
                raise CheckpointError(f"{path}: the contents of {name} have changed since it was written")


def load_state(path: Path) -> dict[str, Any]:
    """The ``state`` that was saved with the checkpoint."""
    try:
        return json.loads((path / STATE).read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the state of {path} cannot be read: {error}") from error


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-")) if _NAME.fullmatch(path.name) else -1


def _make_room(final: Path, temporary: Path) -> None:
    if final.exists() and not (final / MANIFEST).is_file():
        raise CheckpointError(
            f"{final} exists but is not a checkpoint (it has no {MANIFEST}); move it away or choose another folder"
        )
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot create {temporary}: {error}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        known = manifest["format"] == FORMAT
        manifest["files"], manifest["metrics"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: it is unfinished or not a checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error!r}") from error
    if not known:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this rlcore reads {FORMAT}; install its version"
        )
    return manifest  # type: ignore[no-any-return]


def _flush_and_hash(path: Path) -> dict[str, Any]:
    _flush(path)
    return {"size": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until the file, or the entries of the folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
