"""Tools made of functions, and the calls that policies make of them."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from rlcore.errors import ConfigError
from rlcore_agents.tools import Tool, ToolFailure, ToolUse, function_tool, run_tools


@dataclass(frozen=True)
class Call:
    """What a reply has of a call."""

    name: str
    arguments: dict[str, Any] | None = None
    error: str = ""
    id: str = "call00001"


def answers(tools: list[Tool], *calls: Call) -> tuple[list[str], ToolUse]:
    use = ToolUse()
    messages = asyncio.run(run_tools(tools, calls, use))
    assert all(message["role"] == "tool" for message in messages)
    assert [message["tool_call_id"] for message in messages] == [call.id for call in calls]
    return [message["content"] for message in messages], use


def answer(tool: Tool, **arguments: Any) -> str:
    (content,), _ = answers([tool], Call(tool.name, arguments))
    return content


def search(query: Annotated[str, Field(description="words")], *, k: int = 3, on: date | None = None) -> list[str]:
    """Find pages."""
    return [f"{query} {number} {on}" for number in range(k)]


async def echo(text: str, mode: Literal["plain", "loud"] = "plain") -> str:
    """Repeat the text."""
    return text.upper() if mode == "loud" else text


def test_schema_of_a_function_comes_from_its_signature_and_docstring() -> None:
    tool = function_tool(search)

    assert tool.schema() == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Find pages.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "words"},
                    "k": {"type": "integer", "default": 3},
                    "on": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "default": None},
                },
                "required": ["query"],
                "additionalProperties": False,
            },
        },
    }


def test_argument_named_title_stays_in_the_schema() -> None:
    def note(title: str, properties: int = 0) -> str:
        """Write a note."""
        return title

    properties = function_tool(note).parameters["properties"]
    assert properties == {"title": {"type": "string"}, "properties": {"type": "integer", "default": 0}}


def test_arguments_are_converted_to_the_types_of_the_parameters() -> None:
    assert answer(function_tool(search), query="a", k="2", on="2026-01-02") == '["a 0 2026-01-02","a 1 2026-01-02"]'


def test_methods_and_objects_with_state_are_tools() -> None:
    class WordCounter:
        """Count words."""

        total = 0

        def __call__(self, text: str) -> int:
            self.total += len(text.split())
            return self.total

    counter = WordCounter()
    tool = function_tool(counter)

    assert (tool.name, tool.description) == ("word_counter", "Count words.")
    assert [answer(tool, text="a b"), answer(tool, text="c")] == ["2", "3"]


def test_function_of_executed_code_is_a_tool() -> None:
    names: dict[str, Any] = {"__name__": "no_such_module"}
    code = 'from datetime import date\ndef day(of: "date") -> "str":\n    """Say."""\n    return of.isoformat()'
    exec(code, names)
    assert answer(function_tool(names["day"]), of="2026-01-02") == "2026-01-02"


def test_calls_run_concurrently_and_are_answered_in_order() -> None:
    together = threading.Barrier(3)

    def meet(number: int) -> int:
        """Wait for the others."""
        together.wait(5)
        time.sleep(0.05 * (3 - number))
        return number

    calls = [Call("meet", {"number": number}, id=f"id{number}") for number in range(3)]
    contents, use = answers([function_tool(meet)], *calls)

    assert contents == ["0", "1", "2"]
    assert (use.calls, use.errors, use.malformed) == (3, 0, 0)
    assert 0.1 < use.seconds < 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (Call("search", {"query": "a", "depth": 1}), "depth: Unexpected keyword argument"),
        (Call("search", {}), "query: Missing required argument"),
        (Call("search", {"query": "a", "k": "many"}), "k: Input should be a valid integer"),
        (Call("serch", {"query": "a"}), "there is no tool 'serch'; did you mean 'search'?"),
        (Call("zzz", {}), "there is no tool 'zzz'; there is: search, echo"),
        (Call("echo", {"text": "a", "mode": "shout"}), "mode: Input should be 'plain' or 'loud'"),
        (Call("search", None, "the arguments of search are not valid JSON"), "are not valid JSON"),
        (Call("", None), "the call is not valid"),
    ],
)
def test_malformed_call_is_answered_with_what_is_wrong_and_counted(call: Call, said: str) -> None:
    (bad, good), use = answers([function_tool(search), function_tool(echo)], call, Call("echo", {"text": "fine"}))

    assert bad.startswith("Error: ")
    assert said in bad
    assert good == "fine"
    assert (use.calls, use.errors, use.malformed) == (2, 1, 1)


def test_exceptions_of_a_tool_are_answered_and_counted_as_errors() -> None:
    def fail(how: str) -> str:
        """Fail."""
        raise {"value": ValueError("no such page"), "exit": SystemExit(3), "stop": StopIteration()}[how]

    async def fail_later(how: str) -> str:
        """Fail."""
        raise {"exit": SystemExit(3), "cancel": asyncio.CancelledError(), "interrupt": KeyboardInterrupt()}[how]

    calls = [Call("fail", {"how": how}) for how in ("value", "exit", "stop")]
    calls += [Call("fail_later", {"how": how}) for how in ("exit", "cancel", "interrupt")]
    contents, use = answers([function_tool(fail), function_tool(fail_later)], *calls)

    assert contents[0] == "Error: ValueError: no such page"
    assert all(content.startswith("Error: ") for content in contents)
    assert (use.errors, use.malformed) == (6, 0)


def test_call_that_does_not_end_is_answered_and_does_not_hold_the_process() -> None:
    release = threading.Event()

    def block() -> None:
        """Wait."""
        release.wait(60)

    async def stubborn() -> None:
        """Ignore the first cancellation."""
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    began = time.monotonic()
    tools = [function_tool(block, timeout_s=0.1), function_tool(stubborn, timeout_s=0.1)]
    contents, use = answers(tools, Call("block", {}), Call("stubborn", {}))

    assert contents == [f"Error: TimeoutError: {name} did not end within 0.1 s" for name in ("block", "stubborn")]
    assert use.errors == 2
    assert time.monotonic() - began < 5


def test_cancelling_an_episode_cancels_its_calls() -> None:
    cancelled = []

    async def wait() -> None:
        """Wait."""
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.append(True)

    async def episode() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(run_tools([function_tool(wait)], [Call("wait", {})], ToolUse()), 0.05)
        await asyncio.sleep(0.01)
        assert cancelled

    asyncio.run(episode())


def test_failure_of_a_tool_is_not_answered_but_raised() -> None:
    def broken() -> None:
        """Use a server."""
        raise ToolFailure("the server is gone")

    with pytest.raises(ToolFailure, match="the server is gone"):
        answers([function_tool(broken), function_tool(echo)], Call("echo", {"text": "a"}), Call("broken", {}))


def test_results_become_text() -> None:
    @dataclass
    class Page:
        title: str
        on: date

    def give(what: str) -> Any:
        """Give."""
        return {
            "text": "ü \ud800",
            "none": None,
            "page": Page("t", date(2026, 1, 2)),
            "nan": [float("nan"), True],
            "thing": object(),
        }[what]

    tool = function_tool(give)
    assert answer(tool, what="text") == "ü \\ud800"
    assert answer(tool, what="none") == ""
    assert answer(tool, what="page") == '{"title":"t","on":"2026-01-02"}'
    assert answer(tool, what="nan") == "[NaN,true]"
    assert answer(tool, what="thing") == "Error: TypeError: the tool returned a object, which is neither text nor JSON"


def test_long_result_is_cut_with_a_note() -> None:
    tool = function_tool(echo, max_characters=10)
    assert answer(tool, text="a" * 15) == "aaaaaaaaaa\n[5 more characters were cut]"


def test_flood_of_calls_is_not_run() -> None:
    contents, use = answers([function_tool(echo)], *[Call("echo", {"text": str(n)}) for n in range(40)])

    assert contents[31:33] == ["31", "Error: at most 32 calls of a reply are run"]
    assert (use.calls, use.malformed) == (40, 8)


def test_function_that_cannot_be_a_tool_is_refused_with_the_reason() -> None:
    def bare(x):  # type: ignore[no-untyped-def]
        """Do."""

    def several(*numbers: int) -> int:
        """Add."""
        return sum(numbers)

    def silent(x: int) -> int:
        return x

    def odd(x: threading.Thread) -> None:
        """Do."""

    refused: list[tuple[Any, str]] = [
        (bare, "parameter 'x' has no type hint"),
        (several, "parameter 'numbers' cannot be passed by name"),
        (silent, "tool 'silent' has no docstring"),
        (odd, "tool 'odd': the type hints make no JSON schema"),
        (lambda: 1, "tool name '<lambda>' must have"),
    ]
    for function, said in refused:
        with pytest.raises(ConfigError, match=said):
            function_tool(function)
