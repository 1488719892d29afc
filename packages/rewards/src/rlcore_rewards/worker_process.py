"""The trainer's end of one worker process: start it, send it samples, kill it. Blocking; used from one thread."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from threading import Lock
from typing import Any

from rlcore.engines.settings import RewardSettings
from rlcore_rewards import worker_guard
from rlcore_rewards.reply import MAX_BYTES, WorkerFailure, decode
from rlcore_rewards.worker import LENGTH, READY
from rlcore_rewards.worker_guard import CHECK, QUIT

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


class WorkerProcess:
    """One worker process; `start` must be called before `ask`.

    Attributes:
        answered: True if the worker has replied to a sample.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self._settings = settings
        self._closing = Lock()
        self._closed = False
        self.answered = False
        request_read, self._requests = os.pipe()
        self._replies, reply_write = os.pipe()
        control_read, self._control = os.pipe()
        self._output, output_write = os.pipe()
        theirs = (request_read, reply_write, control_read)
        numbers = (*theirs, os.getpid(), settings.memory_mb << 20, settings.max_processes)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlcore_rewards.worker", *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                pass_fds=theirs,
                env=environment(settings.pass_env),
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

    def start(self, loader: str, options: Mapping[str, Any]) -> None:
        """Load the function in the worker: ``loader`` is ``module:attribute`` of a function that takes ``options``.

        Raises:
            WorkerFailure: the function cannot be loaded; the worker must be killed.
        """
        setup = {"sys_path": sys.path, "loader": loader, "options": dict(options)}
        seconds = self._settings.startup_timeout_s
        reply = self._exchange(pickle.dumps(setup), seconds, f"startup_timeout_s={seconds:g}")
        if reply != READY:
            decode(reply)

    def ask(self, request: bytes, seconds: float, limit: str) -> bytes:
        """Send a pickled sample and return the reply.

        Args:
            seconds: timeout.
            limit: setting that defines ``seconds``, for the error message.

        Raises:
            WorkerFailure: no reply arrived; the worker must be killed.
        """
        reply = self._exchange(request, seconds, limit)
        self.answered = True
        return reply

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

    def _exchange(self, request: bytes, seconds: float, limit: str) -> bytes:
        """Write a request, read the reply and the worker's output, all within ``seconds``."""
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
                    if printed > self._settings.max_output_kb << 10:
                        raise WorkerFailure(
                            "output", f"the function printed more than max_output_kb={self._settings.max_output_kb}"
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
                        if len(reply) > expected or expected > LENGTH.size + MAX_BYTES:
                            raise WorkerFailure("protocol", "the worker sent data that is not one reply")
            now = time.monotonic()
            if now >= deadline:
                raise WorkerFailure("timeout", f"the function took longer than {limit}")
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
        if code == worker_guard.MEMORY:
            return WorkerFailure("memory", f"the worker held more than memory_mb={self._settings.memory_mb}")
        if code == worker_guard.PROCESSES:
            return WorkerFailure("processes", f"the worker had more than max_processes={self._settings.max_processes}")
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
