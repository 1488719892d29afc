"""A sandbox that runs Python code, piece by piece with one state, or a command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Any, Self

from rlcore.errors import RlcoreError
from rlcore_kit.sandbox.layout import ENVIRONMENT, plan_of
from rlcore_kit.sandbox.pipes import Output, Pipes
from rlcore_kit.sandbox.programs.plan import Plan
from rlcore_kit.sandbox.settings import SandboxLimits

START_S = 30.0
END_S = 2.0

Way = Callable[[Plan], list[str]]
"""How a sandbox is made: gives the command of its outermost process (`rlcore_kit.sandbox.layout`)."""


class SandboxError(RlcoreError):
    """A sandbox cannot be made or did not start; it says nothing about the code."""


@dataclass(frozen=True)
class Result:
    """What a piece of code, or a command, did.

    Attributes:
        stdout, stderr: text, as much as the limit keeps.
        ok: the code ended without an exception, the command with exit status 0.
        ended: why the sandbox is gone ("timeout", "memory", "signal 9", "exit status 1"); "" if it goes on. The exit
            status of a command is here.
        cut: bytes of output that were not kept.
    """

    stdout: str
    stderr: str
    ok: bool
    ended: str = ""
    cut: int = 0


class Sandbox:
    """One sandbox; a context manager. Methods block; `kill` and `close` may be called from another thread.

    What code says about itself (`Result.ok`, and what it prints) can be forged by the code, which runs in the process
    that reports it. The exit status of a command cannot.
    """

    def __init__(self, limits: SandboxLimits, way: Way) -> None:
        """Start a sandbox, and wait until it takes requests.

        Raises:
            SandboxError: it did not start.
        """
        self.way = way
        self._limits = limits
        self._lock = Lock()
        self._ended = ""
        self._reports, report = os.pipe()
        try:
            self._process = _start(way(plan_of(limits, report)), report)
        except BaseException:
            os.close(self._reports)
            raise
        finally:
            os.close(report)
        self._requests, *self._streams = (
            stream for stream in (self._process.stdin, self._process.stdout, self._process.stderr) if stream
        )
        stdout, stderr = (stream.fileno() for stream in self._streams)
        self._pipes = Pipes(self._requests.fileno(), (stdout, stderr), self._reports)
        output = Output(limits.output_kb << 10)
        try:
            answer = self._pipes.exchange(b"", output, START_S)
            if not (answer or {}).get("ready"):
                said = output.text(1).strip().splitlines()
                raise SandboxError(f"the sandbox did not start: {said[-1][:300] if said else 'it gave no reason'}")
        except BaseException:
            self.close()
            raise

    def run_code(self, source: str) -> Result:
        """Run Python code; it knows the names that earlier code defined."""
        return self._request({"code": source})

    def run_command(self, command: list[str], given: str = "") -> Result:
        """Run a program in place of Python, with ``given`` as its standard input; the sandbox ends with it."""
        return self._request({"command": command, "input": given})

    def _request(self, request: dict[str, Any]) -> Result:
        text = json.dumps(request).encode()
        output = Output(self._limits.output_kb << 10)
        with self._lock:
            if self._ended:
                return Result("", "", False, self._ended)
            answer = self._pipes.exchange(b"%d\n%b" % (len(text), text), output, self._limits.timeout_s)
        if answer is None:
            self.kill("timeout")
        elif "done" not in answer:
            self.kill(_ending(answer))
        ok = answer is not None and (answer.get("exit") == 0 if "command" in request else answer.get("done") is True)
        return Result(output.text(0), output.text(1), ok, self._ended, output.cut)

    def kill(self, reason: str = "killed") -> None:
        """End every process of the sandbox and wait for that; a request of another thread returns."""
        self._ended = self._ended or reason
        self._let_go()  # process 1 ends, and the kernel kills the others
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # so does the kernel where code has stopped process 1
            self._process.wait()

    def _let_go(self) -> None:
        """Close the pipe of requests, whose descriptor another thread may be writing to: its number stays taken."""
        with suppress(ValueError):  # it is closed already
            nothing = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nothing, self._requests.fileno(), inheritable=False)
            finally:
                os.close(nothing)

    def close(self) -> None:
        """End the sandbox and release its pipes; may be called twice."""
        self.kill("closed")
        with self._lock:
            for stream in (self._requests, *self._streams):
                stream.close()
            if self._reports >= 0:
                os.close(self._reports)
            self._reports = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start(command: list[str], report: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, env=ENVIRONMENT, pass_fds=(report,), bufsize=0, cwd="/",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise SandboxError(f"{command[0]} cannot be started: {error.strerror}") from None


def _ending(answer: dict[str, Any]) -> str:
    """Return why the sandbox ended, as `Result.ended`."""
    if answer.get("why"):
        return str(answer["why"])
    status = answer.get("exit")
    if not isinstance(status, int):
        return "killed"
    if status < 0:
        return {-signal.SIGXCPU: "CPU time", -signal.SIGKILL: "killed"}.get(status, f"signal {-status}")
    return f"exit status {status}"
