"""A server that this process starts: its processes, port and log, and why it ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import psutil

from rlcore.errors import EngineError, WorkerDied, WorkerError
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.ports import unused_port
from rlcore_sglang.serve import REFUSED

_POLL_S = 0.25
_PORT_ATTEMPTS = 3
_STOP_TIMEOUT_S = 20.0
_CHILDREN = "sglang::"
_MAXIMUM_QUOTE = 600
"""Characters of a log that a message quotes."""


class ServerProcess:
    """A server in a new process group, on a free loopback port, with a random API key.

    Args:
        arguments: of SGLang's ``ServerArgs``, without host, port and key.
        extra: the arguments that the user added.
        log: file to which the server's output is appended.
        environment: variables in addition to this process's.
        timeout_s: timeout of the start.

    Raises:
        EngineError: the server did not start; the message holds its reason and names the log.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        extra: Mapping[str, Any],
        log: Path,
        environment: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        self.log = log
        self.api_key = secrets.token_urlsafe(24)
        self._environment, self._timeout_s = environment, timeout_s
        for left in range(_PORT_ATTEMPTS - 1, -1, -1):
            self._start(arguments, extra)
            try:
                self._wait()
                return
            except _PortTaken:
                if not left:
                    raise EngineError(
                        f"found no free port for the SGLang server in {_PORT_ATTEMPTS} attempts; see {log}"
                    ) from None
            except BaseException:
                self.stop()
                raise

    @property
    def pid(self) -> int:
        """Process id of the server, which leads its process group."""
        return self._process.pid

    @property
    def failure(self) -> str | None:
        """How the server or one of its processes ended, with the reason in its log; None while it lives."""
        code = self._process.poll()
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        else:
            lost = self._lost()
            if lost is None:
                return None
            how = f"lost its process {lost}"
        return f"the SGLang server {how}: {self.reason()} (its log is {self.log})"

    def _lost(self) -> str | None:
        """Return the name of a dead child process, which SGLang (0.5) may fail to notice; None if all live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children():
                if child.name().startswith(_CHILDREN) and child.status() == psutil.STATUS_ZOMBIE:
                    return str(child.name())
        return None

    def reason(self) -> str:
        """Return why the server ended, from its log."""
        return reason_in(self._output())

    def _output(self) -> str:
        with self.log.open(errors="replace") as log:
            log.seek(self._begin)
            return log.read()

    def stop(self) -> None:
        """End all processes of the server; idempotent."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
                break
        with contextlib.suppress(ProcessLookupError, PermissionError):  # workers may outlive their server
            os.killpg(self.pid, signal.SIGKILL)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _start(self, arguments: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        port = unused_port()
        self.url = f"http://127.0.0.1:{port}"
        self._name = f"rlcore-{secrets.token_hex(8)}"
        own = {"host": "127.0.0.1", "port": port, "api_key": self.api_key, "served_model_name": self._name}
        file = self.log.with_suffix(".json")
        with _private(file, os.O_TRUNC) as target:
            json.dump({"arguments": {**arguments, **own}, "args": dict(extra)}, target, indent=2)
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        with _private(self.log, os.O_APPEND) as output:  # SGLang prints its key
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlcore_sglang.serve", str(file)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )

    def _wait(self) -> None:
        """Wait until the server answers with its random name: another server may have taken the port."""
        deadline = time.monotonic() + self._timeout_s
        connection = Connection(self.url, api_key=self.api_key, retries=0, max_connections=2)
        try:
            while True:
                with contextlib.suppress(WorkerError, EngineError):
                    model = connection.ask("GET", "/model_info", "report its model", timeout_s=10)
                    if model.get("served_model_name") == self._name:
                        return
                if self.failure is not None:
                    self._failed()
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"the SGLang server did not start within {self._timeout_s:g} s (start_timeout_s): "
                        f"{self.reason()} (its log is {self.log})"
                    )
                time.sleep(_POLL_S)
        finally:
            connection.close()

    def _failed(self) -> None:
        reason, taken = self.reason(), "address already in use" in self._output().lower()
        self.stop()
        if taken:
            raise _PortTaken
        if reason.startswith(REFUSED):
            raise EngineError(reason.removeprefix(REFUSED))
        raise EngineError(f"the SGLang server did not start: {reason} (its log is {self.log})")

    def explain(self, error: WorkerDied) -> WorkerDied:
        """Return ``error``, with the process's failure if it has one."""
        deadline = time.monotonic() + 1
        while self.failure is None and time.monotonic() < deadline:  # connections break before the process ends
            time.sleep(0.05)
        return error if self.failure is None else WorkerDied(f"{error}; {self.failure}")


def _private(file: Path, how: int) -> TextIO:
    """Open ``file`` for writing, readable by this user only."""
    return open(os.open(file, os.O_WRONLY | os.O_CREAT | how, 0o600), "w")


class _PortTaken(Exception):
    """Another process took the port before the server did."""


_RAISED = re.compile(r"^(?:\[[^\]]*\]\s*)?((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Exit|Interrupt)\b.*)$")
_ADVICE = (
    ("libcuda", "this build of SGLang needs a GPU and its driver"),
    ("Not enough memory", "raise mem_fraction_static, or free memory of other processes"),
    ("out of memory", "lower mem_fraction_static, or free memory of other processes"),
    ("No module named 'sglang'", "pip install 'rlcore[sglang]'"),
)


def reason_in(log: str) -> str:
    """Return the line of a server's log that says why it ended: that of the first exception, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if not lines:
        return "it printed nothing"
    refused = [line for line in lines if line.startswith(REFUSED)]
    raised = [match.group(1) for line in lines if (match := _RAISED.match(line))]
    line = (refused or raised or lines[-1:])[0]
    if not refused:
        line = line if len(line) <= _MAXIMUM_QUOTE else line[:_MAXIMUM_QUOTE] + " …"
    advice = [text for words, text in _ADVICE if words in line]
    return f"{line}; {advice[0]}" if advice else line
