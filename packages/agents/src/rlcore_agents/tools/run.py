"""Runs the tool calls of a reply and answers each of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from pydantic_core import PydanticSerializationError, to_json

from rlcore.boundary import reason
from rlcore_agents.tools.tool import BadArguments, Tool, ToolError, ToolFailure

MAX_CALLS = 32
"""Calls of one reply that are run."""


class _Call(Protocol):
    """What a call of a reply has (`rlcore_agents.conversation.reply.ToolCall`); arguments None: it is malformed."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> dict[str, Any] | None: ...
    @property
    def error(self) -> str: ...


@dataclass
class ToolUse:
    """What an episode's tool calls amount to.

    Attributes:
        calls: that the policy made or tried to make.
        errors: calls that were answered with an error, malformed ones included.
        malformed: calls that no tool could take: not valid JSON, an unknown tool, wrong arguments.
        seconds: in which the policy waited for tools; calls that run at the same time count once.
    """

    calls: int = 0
    errors: int = 0
    malformed: int = 0
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Return the numbers as metrics of a trajectory."""
        return {
            "tool_calls": float(self.calls),
            "tool_errors": float(self.errors),
            "malformed_calls": float(self.malformed),
            "tool_seconds": self.seconds,
        }


class _Malformed(Exception):
    """Nothing was called; the message says why."""


async def run_tools(tools: Sequence[Tool], calls: Sequence[_Call], use: ToolUse) -> list[dict[str, Any]]:
    """Run ``calls`` concurrently and return one tool message for each, in their order; count them in ``use``.

    Whatever goes wrong in a call is the text of its message, beginning with "Error: ".

    Raises:
        ToolFailure: of a tool; the other calls have been cancelled.
    """
    named = {tool.name: tool for tool in tools}
    began = time.monotonic()
    tasks = [
        asyncio.create_task(_answer(named, call) if index < MAX_CALLS else _refusal())
        for index, call in enumerate(calls)
    ]
    use.calls += len(tasks)
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        use.seconds += time.monotonic() - began
    use.errors += sum(kind != "result" for kind, _ in answers)
    use.malformed += sum(kind == "malformed" for kind, _ in answers)
    return [
        {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text}
        for call, (_, text) in zip(calls, answers, strict=True)
    ]


async def _answer(tools: Mapping[str, Tool], call: _Call) -> tuple[str, str]:
    """Return "result", "error" or "malformed", and the text of the message."""
    tool = tools.get(call.name)
    try:
        if call.arguments is None:
            raise _Malformed(call.error or "the call is not valid")
        if tool is None:
            raise _Malformed(_unknown(call.name, tools))
        text = _text(await _within(tool.timeout_s, tool, call.arguments))
        kind = "result"
    except (_Malformed, BadArguments) as error:
        kind, text = "malformed", f"Error: {error}"
    except ToolError as error:
        kind, text = "error", f"Error: {error}"
    except (ToolFailure, asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:  # a tool that calls sys.exit() does not end the run
        kind, text = "error", f"Error: {reason(error)}"
    return kind, _cut(text, tool.max_characters if tool else 1_000)


async def _refusal() -> tuple[str, str]:
    return "malformed", f"Error: at most {MAX_CALLS} calls of a reply are run"


async def _within(timeout_s: float, tool: Tool, arguments: dict[str, Any]) -> Any:
    """Return the tool's result; a call that does not end in time is cancelled, and abandoned if it does not stop."""

    async def call() -> Any:
        try:
            return await tool.call(arguments)
        except (SystemExit, KeyboardInterrupt) as error:  # which asyncio would hand to the event loop
            raise RuntimeError(reason(error)) from error

    task = asyncio.create_task(call())
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            raise TimeoutError(f"{tool.name} did not end within {timeout_s:g} s")
        if task.cancelled():
            raise RuntimeError(f"{tool.name} cancelled itself")
        return task.result()
    finally:
        task.cancel()


def _unknown(name: str, tools: Mapping[str, Tool]) -> str:
    close = get_close_matches(name, tools, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there is: {', '.join(tools) or 'no tool'}"
    return f"there is no tool {name!r:.80}; {hint}"


def _text(value: Any) -> str:
    """Return a result as the policy reads it: text as it is, anything else as JSON."""
    if not isinstance(value, str):
        try:
            value = "" if value is None else to_json(value, inf_nan_mode="constants").decode()
        except PydanticSerializationError:
            raise TypeError(f"the tool returned a {type(value).__name__}, which is neither text nor JSON") from None
    # tokenizers take no lone surrogates
    return value.encode("utf-8", "backslashreplace").decode()  # type: ignore[no-any-return]


def _cut(text: str, maximum: int) -> str:
    return text if len(text) <= maximum else f"{text[:maximum]}\n[{len(text) - maximum} more characters were cut]"
