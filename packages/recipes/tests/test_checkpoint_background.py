"""Checkpoints that are written while the run goes on."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlcore.controller import LocalExecutor
from rlcore.engines import TrainEngine
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint.background_thread import in_background
from rlcore_recipes.checkpoint import CheckpointManager, RunState, verify


def state(step: int) -> RunState:
    return RunState(recipe="test", step=step, run_id="id", parts={})


class Slow:
    """An engine whose background writes end when the test says so; its state is one number.

    Attributes:
        full: the disk is full.
    """

    def __init__(self) -> None:
        self.value = 0
        self.may_write = threading.Event()
        self.full = False
        self._writing: Any = None

    def save(self, path: Path) -> None:
        path.mkdir(parents=True)
        (path / "value").write_text(str(self.value))

    def start_save(self, path: Path) -> None:
        value = self.value

        def write() -> None:
            assert self.may_write.wait(60)
            path.mkdir(parents=True)
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path / "value"))
            (path / "value").write_text(str(value))

        self._writing = in_background(write, "write")

    def save_done(self) -> bool:
        return self._writing is None or self._writing.done()

    def finish_save(self) -> dict[str, Any]:
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            raise CheckpointError(f"cannot write {error.filename}: {error.strerror}") from error
        return {}


def group(engine: Slow) -> dict[str, TrainEngine]:
    return {"actor": LocalExecutor().workers(TrainEngine, engine, "actor")}  # type: ignore[dict-item, type-abstract, arg-type]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def value(root: Path, name: str) -> int:
    return int((root / name / "actor" / "value").read_text())


def poll_until(manager: CheckpointManager, condition: Callable[[], bool]) -> None:
    """Poll as often as a run makes steps, until it is so."""
    pause = threading.Event()
    for _ in range(6000):
        manager.poll()
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("not within a minute")


def test_a_checkpoint_counts_when_everything_is_written(tmp_path: Path) -> None:
    manager, engine = CheckpointManager(tmp_path), Slow()
    engine.value = 1
    manager.start(1, group(engine), state(1))
    engine.value = 2
    for _ in range(3):
        manager.poll()  # does not wait: the engine was not allowed to write yet
    assert names(tmp_path) == ["step-000001.tmp"]
    assert manager.newest is None
    engine.may_write.set()
    poll_until(manager, lambda: manager.newest is not None)
    assert manager.newest == str(tmp_path / "step-000001")
    assert names(tmp_path) == ["step-000001"]
    verify(tmp_path / "step-000001")
    assert value(tmp_path, "step-000001") == 1


def test_the_next_one_waits_for_the_one_before(tmp_path: Path) -> None:
    manager, engine = CheckpointManager(tmp_path, keep=3), Slow()
    engine.may_write.set()
    for step in (1, 2, 3):
        engine.value = step
        manager.start(step, group(engine), state(step))
        assert [name for name in names(tmp_path) if not name.endswith(".tmp")] == [
            f"step-{before:06d}" for before in range(1, step)
        ]
    manager.finish()
    manager.finish()
    assert [value(tmp_path, f"step-{step:06d}") for step in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("ask", ["poll", "finish", "start"])
def test_a_failed_write_is_an_error_that_names_the_file(tmp_path: Path, ask: str) -> None:
    manager, engine = CheckpointManager(tmp_path), Slow()
    engine.may_write.set()
    manager.start(1, group(engine), state(1))
    manager.finish()
    engine.full = True
    manager.start(2, group(engine), state(2))
    asking: dict[str, Callable[[], Any]] = {
        "poll": lambda: poll_until(manager, lambda: False),
        "finish": manager.finish,
        "start": lambda: manager.start(3, group(engine), state(3)),
    }
    with pytest.raises(CheckpointError, match=r"cannot write .*step-000002\.tmp/actor/value: No space left"):
        asking[ask]()
    assert names(tmp_path) == ["step-000001"]
    verify(tmp_path / "step-000001")
    engine.full = False
    manager.start(2, group(engine), state(2))
    manager.finish()
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_checksums_that_the_engine_took_are_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Knows(Slow):
        def finish_save(self) -> dict[str, Any]:
            super().finish_save()
            return {"value": {"size": 1, "sha256": "0f" * 32}}

    manager, engine = CheckpointManager(tmp_path), Knows()
    engine.may_write.set()
    manager.start(1, group(engine), state(1))
    manager.finish()
    found = manager._storage.manifest("step-000001").files
    assert found["actor/value"]["sha256"] == "0f" * 32
    with pytest.raises(CheckpointError, match="the contents of actor/value have changed"):
        verify(tmp_path / "step-000001")


def test_what_an_engine_says_it_wrote_must_be_there(tmp_path: Path) -> None:
    class Forgets(Slow):
        def finish_save(self) -> dict[str, Any]:
            super().finish_save()
            return {"other": {"size": 1, "sha256": "x"}}

    manager, engine = CheckpointManager(tmp_path), Forgets()
    engine.may_write.set()
    manager.start(1, group(engine), state(1))
    with pytest.raises(CheckpointError, match="actor/other was written but is missing"):
        manager.finish()
    assert names(tmp_path) == []
