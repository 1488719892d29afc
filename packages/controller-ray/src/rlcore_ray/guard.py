"""`Guard`: a small process that outlives the controller and ends what is left of the Ray cluster that it started.

Ray (2.60) ties its daemons to the process that starts them (parent-death signal), and workers end when their raylet is
gone. But two of its agents then try for another minute to report the end to the cluster that is gone; idle workers
check whether their parent is process 1, and keep running where orphans get another parent, such as the manager of a
systemd session; and an interrupted start leaves untracked daemons behind.

The guard notices any end of the controller by the end of a pipe. It finds the cluster's processes by a mark in the
environment of the daemons and by their parents. Linux only.

The process runs this file alone, without the package: it starts in milliseconds and needs little memory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

MARK = "RLCORE_CLUSTER"
START_LOOK_S = 0.2
"""Interval between searches for processes while the cluster starts."""
LOOK_S = 2.0
"""Interval afterwards: workers start and end."""
GRACE_S = 2.0
"""How long processes may take to end by themselves."""
GIVE_UP_S = 30.0

Known = dict[int, str]
"""Process ids and start times of processes: ids are reused."""


class Guard:
    """The controller's side: ends the processes that started within `marking`, at `close` or when this process ends."""

    def __init__(self) -> None:
        self._mark = secrets.token_hex(16)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, self._mark, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the controller's process group is not for the guard
        )

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Have the guard end the cluster that is started in the context; at most one."""
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[MARK]
            with contextlib.suppress(BrokenPipeError):
                self._pipe.write(b"started")
                self._pipe.flush()
            select.select([self._seen], [], [], GIVE_UP_S)  # until it has found all processes

    def close(self) -> None:
        """End the processes that are left, and the guard."""
        self._pipe.close()
        try:
            self._process.wait(GIVE_UP_S + GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._seen.close()

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _seen(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout


def watch(mark: str, controller: int) -> None:
    """Find the cluster's processes, wait for the controller's end, then end those that are left; runs in the guard."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    known: Known = {}
    look_s, controls = START_LOOK_S, sys.stdin.fileno()
    while True:
        ready = select.select([controls], [], [], look_s)[0]
        if ready and not os.read(controls, 4096):
            break
        known = {pid: known[pid] for pid in alive(known)} | family(mark, controller)
        if ready:
            look_s = LOOK_S
            os.write(1, b"seen")
    ended = time.monotonic()
    while (left := alive(known)) and time.monotonic() < ended + GIVE_UP_S:
        if time.monotonic() > ended + GRACE_S:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def family(mark: str, controller: int) -> Known:
    """Return the children of ``controller`` with ``mark`` in their environment, and all of their descendants.

    Descendants may have overwritten their environment with a title.
    """
    parents, started = {}, {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (stat := _stat(int(name))):
            parents[int(name)], started[int(name)] = int(stat[1]), stat[19]
    entry = f"{MARK}={mark}".encode()
    found: set[int] = set()
    wanted = [pid for pid, parent in parents.items() if parent == controller and entry in _environment(pid)]
    while wanted:
        found.update(wanted)
        wanted = [pid for pid, parent in parents.items() if parent in found and pid not in found]
    return {pid: started[pid] for pid in found}


def alive(known: Known) -> list[int]:
    """Return the processes that are running or stopped."""
    return [pid for pid, started in known.items() if (stat := _stat(pid)) and stat[19] == started and stat[0] != "Z"]


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat (proc(5)) from the third, the state; none if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _environment(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


if __name__ == "__main__":
    watch(sys.argv[1], int(sys.argv[2]))
