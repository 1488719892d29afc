"""The trainer's end of one worker process: start it, exchange messages with it, kill it. Blocking; for one thread.

A worker is ``python -m MODULE`` under `rlcore_kit.worker.guard`, which ends everything that it started. Messages are
bytes after their length in four bytes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from threading import Lock

from rlcore_kit.worker import guard
from rlcore_kit.worker.guard import CHECK, QUIT
from rlcore_kit.worker.messages import LENGTH

CHECK_INTERVAL = 0.1
"""Seconds between checks of a busy worker and its descendants (number of processes, memory)."""

LOGGED_OUTPUT = 2000
"""Maximum number of bytes of a dead worker's output that are logged."""

_ENVIRONMENT = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "LANG", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
_ENVIRONMENT_PREFIXES = ("LC_", "PYTHON")
# One thread for each of many workers; GPUs are reserved for the trainer.
_ENVIRONMENT_SET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


class WorkerFailure(Exception):
    """A worker did not do what it was asked to, or could not be started.

    Attributes:
        kind: kind of failure, for counting.
        killed: the worker was ended by SIGKILL, for which what it worked on is not necessarily the cause.
    """

    def __init__(self, kind: str, message: str, killed: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.killed = killed


@dataclass(frozen=True)
class WorkerLimits:
    """What a worker and its children may use.

    Attributes:
        max_output_kb: stdout and stderr of one exchange.
        max_reply: bytes of a message from the worker.
        pass_env: environment variables that the worker sees besides PATH, HOME, locale and the like.
        what: what runs in the worker, for messages.
    """

    memory_mb: int
    max_processes: int
    max_output_kb: int
    max_reply: int
    pass_env: tuple[str, ...] = ()
    what: str = "the function"


class WorkerProcess:
    """One worker process.

    Args:
        module: its program, which calls `rlcore_kit.worker.guard.run_guarded` with the arguments of its command line.
    """

    def __init__(self, module: str, limits: WorkerLimits) -> None:
        self._limits = limits
        self._closing = Lock()
        self._closed = False
        request_read, self._requests = os.pipe()
        self._replies, reply_write = os.pipe()
        control_read, self._control = os.pipe()
        self._output, output_write = os.pipe()
        theirs = (request_read, reply_write, control_read)
        numbers = (*theirs, os.getpid(), limits.memory_mb << 20, limits.max_processes)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                pass_fds=theirs,
                env=environment(limits.pass_env),
                start_new_session=True,  # only the trainer receives Ctrl-C
            )
        except BaseException:
            self._close_pipes()
            raise
        finally:
            for descriptor in (*theirs, output_write):
                os.close(descriptor)
        for descriptor in (self._requests, self._replies, self._output):
            os.set_blocking(descriptor, False)

    def idle(self) -> bool:
        """Return True if the worker is alive and has sent nothing unexpected."""
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        return not poll.poll(0)

    def interrupt(self) -> None:
        """End the worker from another thread than the one that uses it; the using thread sees the worker die."""
        with self._closing:
            if not self._closed:
                self._command(QUIT)

    def kill(self) -> None:
        """End the worker and all its descendants; idempotent."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._close_pipes()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # the guard hangs; the worker dies with it
            self._process.kill()
            self._process.wait()

    def _close_pipes(self) -> None:
        for descriptor in (self._control, self._requests, self._replies, self._output):
            os.close(descriptor)

    def exchange(self, request: bytes, seconds: float, limit: str) -> bytes:
        """Write a request, read the reply and the worker's output, all within ``seconds``.

        Args:
            limit: setting that defines ``seconds``, for the error message.

        Raises:
            WorkerFailure: no reply arrived; the worker must be killed.
        """
        now = time.monotonic()
        deadline, check = now + seconds, now + CHECK_INTERVAL
        outgoing = memoryview(LENGTH.pack(len(request)) + request)
        reply, printed, output = bytearray(), 0, b""
        poll = select.poll()
        poll.register(self._requests, select.POLLOUT)
        poll.register(self._replies, select.POLLIN)
        poll.register(self._output, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll((min(deadline, check) - now) * 1000 + 1):
                if descriptor == self._requests:
                    outgoing = self._write(outgoing)
                    if not outgoing:
                        poll.unregister(self._requests)
                elif descriptor == self._output:
                    text = os.read(self._output, 65536)
                    printed += len(text)
                    output = (output + text)[-LOGGED_OUTPUT:]
                    if not text:  # the worker closed its stdout and stderr
                        poll.unregister(self._output)
                    if printed > self._limits.max_output_kb << 10:
                        raise WorkerFailure(
                            "output",
                            f"{self._limits.what} printed more than max_output_kb={self._limits.max_output_kb}",
                        )
                else:
                    text = os.read(self._replies, 65536)
                    if not text:
                        raise self._death(output)
                    reply += text
                    if len(reply) >= LENGTH.size:
                        expected = LENGTH.size + LENGTH.unpack_from(reply)[0]
                        if len(reply) == expected:
                            return bytes(reply[LENGTH.size :])
                        if len(reply) > expected or expected > LENGTH.size + self._limits.max_reply:
                            raise WorkerFailure("protocol", "the worker sent data that is not one reply")
            now = time.monotonic()
            if now >= deadline:
                raise WorkerFailure("timeout", f"{self._limits.what} took longer than {limit}")
            if now >= check:
                check = now + CHECK_INTERVAL
                self._command(CHECK)

    def _command(self, command: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # the guard has ended, and the worker with it
            os.write(self._control, command)

    def _write(self, outgoing: memoryview) -> memoryview:
        try:
            return outgoing[os.write(self._requests, outgoing) :]
        except BrokenPipeError:  # the pipe of replies reports the death
            return outgoing[:0]

    def _death(self, output: bytes) -> WorkerFailure:
        with contextlib.suppress(BlockingIOError):
            output = (output + os.read(self._output, 65536))[-LOGGED_OUTPUT:]
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return WorkerFailure("died", "the worker closed its pipe")
        if code == guard.MEMORY:
            return WorkerFailure("memory", f"the worker held more than memory_mb={self._limits.memory_mb}")
        if code == guard.PROCESSES:
            return WorkerFailure("processes", f"the worker had more than max_processes={self._limits.max_processes}")
        number = -code if code < 0 else code - 128  # negative: the guard itself was killed
        how = f"by signal {signal.Signals(number).name}" if number in set(signal.Signals) else f"with code {code}"
        printed = output.decode(errors="replace").strip()
        message = f"the worker process ended {how}{f'; its last output: {printed}' if printed else ''}"
        return WorkerFailure("died", message, killed=number == signal.SIGKILL)


def environment(passed: tuple[str, ...]) -> dict[str, str]:
    """Return the environment of a worker: no keys or tokens of the trainer except those named in ``passed``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name in passed or name.startswith(_ENVIRONMENT_PREFIXES)
    }
    return _ENVIRONMENT_SET | kept
