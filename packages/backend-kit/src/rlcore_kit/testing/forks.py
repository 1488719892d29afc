"""Processes that are forked from one process with torch and transformers imported.

Each process that a test starts spends about five seconds of CPU time on imports. `ForkServer` imports once; a forked
process starts within milliseconds and runs the same program with its arguments, environment and streams.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO
from unittest.mock import patch

HERE = Path(__file__).parent


class ForkServer:
    """A process that imports ``modules`` and forks others.

    The modules must start no threads on import. Ray (2.60) must not be among them: its connections fail in a fork.
    """

    def __init__(self, *modules: str) -> None:
        self._folder = TemporaryDirectory(prefix="rlcore-fork-")
        self.path = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-P", HERE / "fork_server.py", self.path, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the fork server did not start; its output says why"

    def start(self, argv: Sequence[str], env: Mapping[str, str], new_session: bool = False) -> Forked:
        """Start ``python ARGV`` in a forked process; stdout and stderr go to one pipe."""
        read, write = os.pipe()
        client = socket.socket(socket.AF_UNIX)
        client.connect(self.path)
        order = {"argv": list(argv), "environ": dict(env), "cwd": os.getcwd(), "new_session": new_session}
        with open(os.devnull) as nothing:
            socket.send_fds(client, [json.dumps(order).encode() + b"\n"], [nothing.fileno(), write, write])
            answers = client.makefile("rb", buffering=0)  # `select` sees all that was not read
            pid = int(answers.readline())
        os.close(write)
        return Forked(pid, answers, os.fdopen(read))

    @contextmanager
    def ray_workers(self) -> Iterator[None]:
        """Fork the workers of Ray clusters that this process starts within the context."""
        import ray
        from ray._private.parameter import RayParams

        worker = Path(ray.__file__).parent / "_private/workers/default_worker.py"
        variables = {"RLCORE_FORK_SERVER": self.path, "RLCORE_FORK_SCRIPT": str(worker)}
        os.environ.update(variables)
        try:
            init = partialmethod(RayParams.__init__, worker_path=str(HERE / "fork_client.py"))
            with patch.object(RayParams, "__init__", init):
                yield
        finally:
            for name in variables:
                del os.environ[name]

    def close(self) -> None:
        """End the server. Forked processes continue."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._folder.cleanup()


class Forked:
    """A process of a `ForkServer`, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, answers: io.RawIOBase, stdout: IO[str]) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._answers = answers

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; raise ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(["forked"], timeout or 0)
            self.returncode = int(self._answers.readline())
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Return the rest of the output. A process that does not end within ``timeout`` seconds is killed."""
        killer = threading.Timer(timeout or threading.TIMEOUT_MAX, self.kill)
        killer.daemon = True
        killer.start()
        output = self.stdout.read()
        killed = not killer.is_alive()
        killer.cancel()
        self.stdout.close()
        if killed:
            raise subprocess.TimeoutExpired(["forked"], timeout or 0, output)
        self.wait()
        return output, None

    def send_signal(self, number: int) -> None:
        """Send the signal unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)
