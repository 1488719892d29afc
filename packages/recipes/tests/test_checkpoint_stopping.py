"""Runs that are stopped, or fail, around a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlcore_recipes.run.loop import train
from rlcore_recipes.run.output import output_may_end

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not
from test_train_loop import lines, make

STUCK = """
import os, signal, sys, threading
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from test_train_loop import make
from rlcore_recipes.run.loop import train

run, _ = make(Path(sys.argv[2]), f"save_freq={sys.argv[3]}", "grace_s=0.5", "async_save=false")
signal_number = signal.Signals[sys.argv[4]]
plain = run.step

def step(number):
    if number == 3:
        os.kill(os.getpid(), signal_number)
        threading.Event().wait(120)
    return plain(number)

run.step = step
train(run)
"""


@pytest.fixture(autouse=True, scope="module")
def terminable() -> Iterator[None]:
    """Under ``nohup`` SIGHUP is ignored, here and in the processes that tests start, and a run leaves it so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "every", "how"),
    [("SIGTERM", "1", "continue from {}/checkpoints/step-000002"), ("SIGHUP", "9", "there is no")],
)
def test_a_step_that_does_not_end_is_given_up(tmp_path: Path, name: str, every: str, how: str) -> None:
    arguments = [sys.executable, "-c", STUCK, str(Path(__file__).parent), str(tmp_path), every, name]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 128 + signal.Signals[name], ended.stderr
    assert f"gave up in the middle of a step, 0.5 s after {name} (trainer.grace_s); " in ended.stderr
    assert how.format(tmp_path) in ended.stderr


def kill_in_step(tmp_path: Path, number: int, *keys: str) -> int:
    """The exit code of a run that gets SIGTERM in its second step."""
    run, _ = make(tmp_path, *keys)
    plain = run.step

    def step(at: int) -> dict[str, float]:
        if at == 2:
            os.kill(os.getpid(), number)
        return plain(at)

    run.step = step
    before = signal.getsignal(number), signal.set_wakeup_fd(-1)
    with pytest.raises(SystemExit) as stop:
        train(run)
    assert (signal.getsignal(number), signal.set_wakeup_fd(-1)) == before
    return int(str(stop.value.code))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_make_a_checkpoint_and_exit_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    assert kill_in_step(tmp_path, number, "save_freq=100", "grace_s=60") == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    said = capsys.readouterr().err
    assert "stopping after this step (within 60 s)" in said
    assert "stopped after step 2 of 4; run the same command again to continue" in said
    train(make(tmp_path, "save_freq=100")[0])
    assert [line["step"] for line in lines(tmp_path)][-3:] == [2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_without_checkpoints_says_that_nothing_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    assert kill_in_step(tmp_path, number, "save_freq=-1") == 128 + number
    assert "stopped after step 2 of 4; nothing was saved" in capsys.readouterr().err


def test_sighup_stays_ignored_where_it_is(tmp_path: Path) -> None:
    run, _ = make(tmp_path)
    plain = run.step

    def step(number: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGHUP)
        return plain(number)

    run.step = step
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        train(run)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(lines(tmp_path)) == 4


@pytest.mark.parametrize("gone", [("stdout",), ("stdout", "stderr")])
def test_a_run_survives_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gone: tuple[str, ...]
) -> None:
    for name in gone:
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, name, os.fdopen(writer, "w"))
    with output_may_end():
        train(make(tmp_path, "trackers=[console]", "save_freq=1", steps=1)[0])
        train(make(tmp_path, "trackers=[console]", "save_freq=1")[0])  # says that it continues
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    for name in gone:
        getattr(sys, name).close()  # what it still holds goes nowhere, without an error
    assert ("standard output was closed" in capsys.readouterr().err) == ("stderr" not in gone)


def test_a_step_that_fails_does_not_lose_the_checkpoint_under_way(tmp_path: Path) -> None:
    run, _ = make(tmp_path, "save_freq=1")
    plain = run.step

    def step(number: int) -> dict[str, float]:
        if number == 3:
            raise ZeroDivisionError("bug")
        return plain(number)

    run.step = step
    with pytest.raises(ZeroDivisionError):
        train(run)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_checkpoints_elsewhere(tmp_path: Path, async_save: str) -> None:
    keys = ("save_freq=1", f"checkpoint_dir=file://{tmp_path}/elsewhere", f"async_save={async_save}")
    train(make(tmp_path / "run", *keys, steps=2)[0])
    again, model = make(tmp_path / "run", *keys)
    train(again)
    whole, expected = make(tmp_path / "whole")
    train(whole)
    assert model.value == expected.value
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["step-000003", "step-000004"]
