"""`python`: an interpreter in a sandbox, which keeps its variables from call to call of one episode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from threading import Lock

from rlcore_agents.tools.function import function_tool
from rlcore_agents.tools.thread import in_thread
from rlcore_agents.tools.tool import Tool, ToolFailure
from rlcore_kit.sandbox.detection import open_sandbox
from rlcore_kit.sandbox.session import START_S, Result, Sandbox, SandboxError
from rlcore_kit.sandbox.settings import SandboxLimits

DESCRIPTION = (
    "Run Python code and return what it prints, and the value of its last line. Variables are kept between calls. "
    "There is no network; files can be written to /tmp."
)


@asynccontextmanager
async def python_tool(limits: SandboxLimits, max_characters: int) -> AsyncIterator[Tool]:
    """Give the interpreter of one episode, whose sandbox starts with its first call."""
    interpreter = Interpreter(limits)
    timeout_s = limits.timeout_s + START_S
    try:
        yield function_tool(
            interpreter.run, name="python", description=DESCRIPTION, timeout_s=timeout_s, max_characters=max_characters
        )
    finally:
        interpreter.close()


class Interpreter:
    """A Python interpreter in a sandbox, which is replaced when code ends it. Calls wait for each other."""

    def __init__(self, limits: SandboxLimits) -> None:
        self._limits = limits
        self._sandbox: Sandbox | None = None
        self._closed = False
        self._lock = Lock()

    async def run(self, code: str) -> str:
        """Run code and return what it printed.

        Raises:
            ToolFailure: there is no sandbox to run it in.
        """
        try:
            return await in_thread(lambda: self._run(code))
        except SandboxError as error:
            raise ToolFailure(f"python: {error}") from None
        except asyncio.CancelledError:  # the thread goes on, unless what it waits for ends
            if self._sandbox:
                self._sandbox.kill()
            raise

    def _run(self, code: str) -> str:
        with self._lock:
            if self._sandbox is None and not self._closed:
                self._sandbox = open_sandbox(self._limits)
            sandbox = self._sandbox
            if sandbox is None or self._closed:  # also where the episode ended while its sandbox started
                self.close()
                raise SandboxError("the episode has ended")
            result = sandbox.run_code(code)
            if result.ended:
                sandbox.close()
                self._sandbox = None
        return self._text(result)

    def _text(self, result: Result) -> str:
        parts = [result.stdout.rstrip("\n"), result.stderr.rstrip("\n")]
        if result.cut:
            parts.append(f"[{result.cut} more bytes of output were cut]")
        if result.ended:
            ends = {"timeout": f"{self._limits.timeout_s:g} s", "memory": f"{self._limits.memory_mb} MiB of memory"}
            why = f"it took more than {ends[result.ended]}" if result.ended in ends else result.ended
            parts.append(f"[the interpreter ended ({why}); its variables are lost]")
        return "\n".join(part for part in parts if part)

    def close(self) -> None:
        """End the sandbox, also under code that runs."""
        self._closed = True
        sandbox = self._sandbox
        if sandbox:
            sandbox.kill("closed")
            sandbox.close()
