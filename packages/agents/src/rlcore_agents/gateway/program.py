"""Running an agent program for one episode."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlcore.errors import ConfigError, RlcoreError

TERMINATE_S = 2.0
"""Seconds that a program has to end itself after SIGTERM."""
OUTPUT_S = 1.0
"""Seconds in which the end of a program's output is waited for."""
LONGEST_EXCERPT = 2000
"""Characters of a program's output that messages repeat."""
MARK = "RLCORE_EPISODE"
"""Variable with the episode's id, by which processes that left the program's process group are found."""
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "LANG", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SSL_CERT_FILE")
KEPT_PREFIXES = ("LC_", "PYTHON")


class AgentFailure(RlcoreError):
    """The agent program failed; the episode is invalid.

    Attributes:
        output: the end of what it printed; None if that is not known.
    """

    def __init__(self, message: str, output: bytes | bytearray | None = None) -> None:
        super().__init__(message)
        self.output = output


def environment(passed: Sequence[str], added: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a program: no keys or tokens of the run except those named in ``passed``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or name in passed or name.startswith(KEPT_PREFIXES)
    }
    return kept | dict(added)


def resolved(command: Sequence[str]) -> list[str]:
    """Return ``command`` with the program's path, and with absolute paths for words that name existing files.

    Raises:
        ConfigError: there is no such program.
    """
    program = shutil.which(command[0])
    if program is None:
        raise ConfigError(
            f"there is no program {command[0]!r} (rollout.environment.command.command); give a program on the PATH, or "
            "the path of an executable file"
        )
    return [
        os.path.abspath(program),
        *(os.path.abspath(word) if os.path.exists(word) else word for word in command[1:]),
    ]


async def run_program(
    command: Sequence[str], variables: Mapping[str, str], folder: Path, timeout_s: float, output_bytes: int
) -> None:
    """Run a program to its end; then none of its processes is left.

    Args:
        variables: its environment, with `MARK`.

    Raises:
        AgentFailure: it cannot be started, takes longer than ``timeout_s``, or ends with another exit status than 0.
    """
    # not asyncio's pipe: its `wait` waits for all processes that hold the pipe, those that the program left behind too
    reading, writing = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            cwd=folder,
            env=dict(variables),
            start_new_session=True,
        )
    except BaseException as error:
        os.close(reading)
        if not isinstance(error, OSError):
            raise
        raise AgentFailure(f"the program {command[0]} cannot be started: {error.strerror or error}") from None
    finally:
        os.close(writing)
    output = bytearray()
    reader = asyncio.ensure_future(_keep_end(reading, output, output_bytes))
    try:
        async with asyncio.timeout(timeout_s):
            code = await process.wait()
    except TimeoutError:
        problem = f"the program took longer than {timeout_s:g} s (rollout.environment.timeout_s) and was ended"
    else:
        problem = "" if code == 0 else f"the program {_ending(code)}"
    finally:
        await asyncio.shield(_end(process, variables[MARK]))
        await asyncio.wait([reader], timeout=OUTPUT_S)
        reader.cancel()
    if problem:
        raise AgentFailure(problem, output)


def excerpt(output: bytes | bytearray) -> str:
    """Return the end of a program's output for a message."""
    text = output.decode("utf-8", "backslashreplace").strip()[-LONGEST_EXCERPT:]
    return f"Its last output:\n{text}" if text else "It printed nothing"


def _ending(code: int) -> str:
    if code > 0:
        return f"ended with exit status {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


async def _keep_end(reading: int, output: bytearray, limit: int) -> None:
    """Read a pipe to its end and keep the last ``limit`` bytes, so that a program never waits for a reader."""
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb", buffering=0)
    )
    try:
        while chunk := await stream.read(1 << 16):
            output += chunk
            del output[:-limit]
    finally:
        transport.close()


async def _end(process: asyncio.subprocess.Process, mark: str) -> None:
    """End the program and every process that it left behind."""
    if process.returncode is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), TERMINATE_S)
    if process.returncode is None:
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()
    await asyncio.to_thread(_kill_marked, f"{MARK}={mark}".encode())


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _kill_marked(entry: bytes) -> None:
    deadline = time.monotonic() + TERMINATE_S
    while (found := list(_marked(entry))) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _marked(entry: bytes) -> Iterator[int]:
    """Yield the processes that have ``entry`` in their environment; ended ones have none."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if entry in file.read().split(b"\0"):
                    yield int(name)
