"""Checkpoints of a whole run: atomic, verified, rotating.

Invariants: a folder ``step-N`` with a manifest is complete, because it is written under another name, flushed to disk,
and renamed last; and nothing but this module's own folders is ever moved or deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from warnings import warn

from rlcore.errors import CheckpointError
from rlcore_recipes.processes import all_gather, on_rank_zero

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
    """

    def __init__(
        self,
        root: Path,
        keep: int = 2,
        *,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
    ) -> None:
        self.root = root
        self._keep = keep
        self._best_metric = best_metric
        self._sign = 1 if best_mode == "max" else -1
        self._damaged: set[Path] = set()
        on_rank_zero(self._clean_up)

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
        state_text = json.dumps(dict(state))
        on_rank_zero(lambda: _make_room(final, temporary))
        try:
            _on_all_ranks(lambda: write(temporary), f"cannot write {final}")
            on_rank_zero(lambda: self._commit(step, temporary, final, state_text, metrics or {}))
        except Exception:
            on_rank_zero(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, or None; damaged ones are passed over with a warning."""
        return on_rank_zero(self._latest)

    def best(self) -> Path | None:
        """The checkpoint that is best by ``best_metric``, if any."""
        return on_rank_zero(self._best)

    def resume_from(self, choice: str) -> Path | None:
        """The checkpoint to go on from, None to start afresh. ``choice`` is "auto" (the newest whole one),
        "never", or a checkpoint's folder.

        Raises:
            CheckpointError: the chosen one is missing or damaged, or the run would mix with later checkpoints that are
                in ``root`` already.
        """
        return on_rank_zero(lambda: self._resume_from(choice))

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
                warn(f"skipped a damaged checkpoint: {error}", stacklevel=2)
            else:
                return path
        return None

    def _best(self) -> Path | None:
        scores: list[tuple[float, int, Path]] = []
        for path in self._checkpoints():
            if path not in self._damaged and (path / MANIFEST).is_file():
                score = _read_manifest(path)["metrics"].get(self._best_metric)
                if score is not None and score == score:  # not NaN
                    scores.append((self._sign * score, _step(path), path))
        return max(scores)[-1] if scores else None

    def _commit(self, step: int, temporary: Path, final: Path, state_text: str, metrics: Mapping[str, float]) -> None:
        old = final.with_name(f"{final.name}.old")
        try:
            (temporary / STATE).write_text(state_text)
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
            for folder in {temporary, *(parent for path in files for parent in path.relative_to(temporary).parents)}:
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
        whole = [path for path in self._checkpoints() if path not in self._damaged and _step(path) <= step]
        for path in set(whole[: -self._keep]) - {self._best()}:
            if (path / MANIFEST).is_file():
                # renamed first: a crash while deleting leaves nothing that looks like a checkpoint
                doomed = path.with_name(f"{path.name}.tmp")
                os.rename(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

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


def _on_all_ranks(action: Callable[[], None], what: str) -> None:
    """Run ``action`` on every process; an error on any of them reaches all."""
    problem: Exception | None = None
    try:
        action()
    except OSError as error:
        problem = CheckpointError(f"{what}: {error}")
        problem.__cause__ = error
    except Exception as error:
        problem = error
    problems = all_gather(problem and f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
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


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any], keys: Sequence[str], path: Path) -> None:
    """Check that a run continues under the settings it was started with, as far as it must.

    Args:
        saved: configuration stored in the checkpoint, as plain values.
        keys: dotted paths that must not have changed, such as ``actor.model.path``.

    Raises:
        CheckpointError: names every difference.
    """
    changed = [
        f"{key} was {_at(saved, key)!r} and is now {_at(current, key)!r}"
        for key in keys
        if _at(saved, key) != _at(current, key)
    ]
    if changed:
        raise CheckpointError(
            f"{path} cannot be continued under this configuration: {'; '.join(changed)}; change it back, or start "
            "another run in another folder"
        )


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


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
