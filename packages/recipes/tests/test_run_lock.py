"""One run at a time in an output folder, whatever became of the one before."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from rlcore.errors import ConfigError, RlcoreWarning
from rlcore_recipes.run.lock import LOCK, claimed


def test_a_second_run_is_refused_with_host_and_process_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    here = f"process {os.getpid()} on {socket.gethostname()}"
    with claimed(folder) as main:
        assert main
        with pytest.raises(ConfigError, match=rf"is in use by another run \({here}, since 20"), claimed(folder):
            pass
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    with claimed(folder):
        pass


def test_a_folder_that_stayed_empty_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "runs" / "a"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with claimed(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with claimed(tmp_path):
            os._exit(0)  # as by SIGKILL: nothing is cleaned up
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).read_text().startswith(f"process {child} on ")
    with claimed(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_other_ranks_leave_the_lock_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with claimed(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with claimed(tmp_path) as main:
            assert not main
    monkeypatch.setenv("RANK", "0")
    with claimed(tmp_path) as main:
        assert main


def test_without_locks_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(RlcoreWarning, match="has no locks: only a run on this machine is noticed$"), claimed(tmp_path):
        pass
    (tmp_path / LOCK).write_text(f"process {os.getppid()} on {socket.gethostname()}, since yesterday")
    with pytest.raises(ConfigError, match=f"process {os.getppid()} on .*since yesterday"), claimed(tmp_path):
        pass
    (tmp_path / LOCK).write_text("process 12 on another-host, since yesterday")
    with (
        pytest.warns(RlcoreWarning, match="process 12 on another-host, since yesterday did not end"),
        claimed(tmp_path),
    ):
        pass


def test_things_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file; name a folder"), claimed(tmp_path / "file"):
        pass
    with (
        pytest.raises(ConfigError, match="cannot be created: NotADirectoryError"),
        claimed(tmp_path / "file" / "below"),
    ):
        pass
    with pytest.raises(ConfigError, match=r"cannot be created: OSError: .*too long"), claimed(tmp_path / ("x" * 300)):
        pass
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(ConfigError, match="is not a regular file; move it away"), claimed(tmp_path):
        pass
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).write_bytes(bytes(range(256)))  # whatever it says, no process holds it
    with claimed(tmp_path):
        pass
