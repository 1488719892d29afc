"""A small process that outlives the controller and ends whatever is left of the Ray cluster that it started.

Ray (2.60) ties its daemons to the process that starts them (parent-death signal), and workers end when their raylet is
gone. But two of its agents then try for another minute to report the end to the cluster that is gone; workers that are
idle look for process 1 as their new parent, and live on where orphans go to another one, such as the manager of a
systemd session; and a start that is interrupted half-way leaves daemons behind that nobody knows of.

The guard hears of the controller's end, of whatever kind, by the end of a pipe. It knows the cluster's processes by a
mark in the environment of the daemons and by who started whom. Linux only.

The process runs this file alone, without the package: it starts in milliseconds and holds no memory to speak of.
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
"""Between looks at a cluster that is starting."""
LOOK_S = 2.0
"""Later: workers come and go."""
GRACE_S = 2.0
"""How long processes are given to end by themselves."""
GIVE_UP_S = 30.0

Known = dict[int, str]
"""Process ids, and when those processes started: ids are used again."""


class Guard:
    """The controller's end. What `marking` saw starting is ended at `close`, or when this process ends."""

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
        """A cluster that is started inside is the guard's; there can be one."""
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[MARK]
            with contextlib.suppress(BrokenPipeError):
                self._pipe.write(b"started")
                self._pipe.flush()
            select.select([self._seen], [], [], GIVE_UP_S)  # until it has seen everything

    def close(self) -> None:
        """End what is left, and the guard."""
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
    """In the guard: see a cluster start, wait for the controller's end, then end what is left of the cluster."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    known: Known = {}
    look_s, controls = START_LOOK_S, sys.stdin.fileno()
    while True:
        told = select.select([controls], [], [], look_s)[0]
        if told and not os.read(controls, 4096):
            break
        known = {pid: known[pid] for pid in alive(known)} | family(mark, controller)
        if told:
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
    """The children of ``controller`` that have ``mark`` in their environment, and everything that descends from them.

    Descendants may have overwritten their environment by a title.
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
    """Those of the processes that run, or were stopped."""
    return [pid for pid, started in known.items() if (stat := _stat(pid)) and stat[19] == started and stat[0] != "Z"]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat (proc(5)) from the third, the state; none if the process is gone."""
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
