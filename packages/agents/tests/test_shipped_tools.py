"""The tools that ship: calculator, interpreter and retrieval, by the settings that name them."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlcore.errors import ConfigError
from rlcore_agents.tools import Tool, ToolFailure, ToolUse, run_tools
from rlcore_agents.tools.settings import FunctionSettings, ToolSettings
from rlcore_agents.tools.shipped.calculator import calculator, calculator_tool
from rlcore_agents.tools.source import ToolSource
from rlcore_kit.sandbox import detection
from rlcore_kit.sandbox.detection import WAYS, fault


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any] | None
    error: str = ""
    id: str = "call00001"


def ask(source: ToolSource, *calls: Call) -> list[str]:
    """Make ``calls`` one after the other in one episode."""

    async def episode() -> list[str]:
        async with source.episode() as tools:
            return [(await run_tools(tools, [call], ToolUse()))[0]["content"] for call in calls]

    return asyncio.run(episode())


def answer(tool: Tool, **arguments: Any) -> str:
    return str(asyncio.run(run_tools([tool], [Call(tool.name, arguments)], ToolUse()))[0]["content"])


# --- calculator -------------------------------------------------------------------------------------------------------

ARITHMETIC = st.recursive(
    st.integers(0, 99).map(str) | st.floats(0.01, 99, allow_nan=False).map(lambda number: f"{number:.3f}"),
    lambda inner: st.tuples(inner, st.sampled_from([" + ", "-", "*", " / ", "%", "//"]), inner).map(
        lambda parts: f"({''.join(parts)})"
    ),
    max_leaves=8,
)


@given(ARITHMETIC)
def test_calculator_agrees_with_python(expression: str) -> None:
    said = answer(calculator_tool(), expression=expression)
    try:
        expected = eval(expression)
    except ZeroDivisionError:
        assert said.startswith("Error: ZeroDivisionError")
    else:
        assert math.isclose(float(said), expected, rel_tol=1e-11, abs_tol=1e-300)


def test_calculator_writes_numbers_as_people_do() -> None:
    said = {
        "0.1 + 0.2": "0.3", "2^10": "1024", "2 ** 3 ^ 2": "512", "7 × 8 ÷ 2 − 1": "27", "-3 + +2": "-1",
        " 12345678987654321 * 3 ": "37037036962962963", "sqrt(2)": "1.41421356237", "max(1, 2.5, abs(-7))": "7",
        "factorial(5) / 120": "1", "round(2.567, 2)": "2.57", "sin(pi / 2)": "1", "10 // 3 + 10 % 3": "4",
        "1e300 * 10": "1e+301", "log(e)": "1",
    }  # fmt: skip
    assert {expression: calculator(expression) for expression in said} == said


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')", "(1).__class__", "x", "[1][0]", "lambda: 1", "'a' * 3", "True + 1",
        "open(1)", "1 if 1 else 2", "1 < 2", "1,000", "1 +", "", "sqrt(x=1)", "().__class__", "f'{1}'", "1j",
        "(y := 3)", "2 \n 3",
    ],
)  # fmt: skip
def test_calculator_takes_nothing_but_arithmetic(expression: str) -> None:
    use = ToolUse()
    [message] = asyncio.run(run_tools([calculator_tool()], [Call("calculator", {"expression": expression})], use))
    assert message["content"].startswith("Error: ")
    assert "arithmetic" in message["content"]
    assert (use.errors, use.malformed) == (1, 1)


@pytest.mark.parametrize(
    "expression",
    [
        "9 ** 9 ** 9", "9 ** (9 ** 9)", "(-1) ** 0.5", "factorial(100000)", "factorial(2.5)", "10.0 ** 1000", "1 / 0",
        "2 ** 4000 * 2 ** 4000", "(((2 ** 4000)) ** 2)", "sqrt(-1)", "sqrt(1, 2)", "lcm(2**4000, 3**2500)",
        "1" * 900 + " ** 2", "(" * 400 + "1" + ")" * 400, "-" * 900 + "1", "+".join("1" * 600), "1" * 1001,
        "floor(1e308 * 10)",
    ],
)  # fmt: skip
def test_calculator_refuses_what_is_too_large_or_has_no_value(expression: str) -> None:
    began = time.monotonic()
    said = answer(calculator_tool(), expression=expression)
    assert said.startswith("Error: ") or float(said)
    assert len(said) < 1300
    assert time.monotonic() - began < 1


# --- interpreter ------------------------------------------------------------------------------------------------------


def python_source(**limits: Any) -> ToolSource:
    return ToolSource(ToolSettings.model_validate({"tools": [{"name": "python", "limits": limits}]}))


def test_interpreter_without_a_sandbox_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "WAYS", {})
    monkeypatch.setattr("rlcore_agents.tools.source.working_way", detection.working_way.__wrapped__)
    with pytest.raises(ConfigError, match=r"tool python: model-written code runs in a sandbox only.*bubblewrap"):
        python_source()


def python(*pieces: str, **limits: Any) -> list[str]:
    """Run pieces of code in one episode."""
    return ask(python_source(**limits), *(Call("python", {"code": piece}) for piece in pieces))


if not all(map(fault, WAYS)):  # else the refusal above is what there is to test

    def test_interpreter_keeps_variables_within_an_episode_alone() -> None:
        nothing, hello, error, x = python("x = 6", "print('hello')\nx * 7", "1 / 0", "x")
        assert (nothing, hello, x) == ("", "hello\n42", "6")
        assert error.startswith('Traceback (most recent call last):\n  File "<code 3>", line 1, in <module>')
        assert error.endswith("\nZeroDivisionError: division by zero")
        assert "NameError" in python("x")[0]

    def test_interpreter_begins_again_after_code_that_ended_it() -> None:
        said = python("x = 1", "print('a')\nwhile True: pass", "x", "import os\nos._exit(3)", "2", timeout_s=0.5)
        assert said[1] == "a\n[the interpreter ended (it took more than 0.5 s); its variables are lost]"
        assert "NameError" in said[2]
        assert said[3] == "[the interpreter ended (exit status 3); its variables are lost]"
        assert said[4] == "2"

    def test_interpreter_cuts_output() -> None:
        [said] = python("print('x' * 5000)", output_kb=1)
        assert said == "x" * 1024 + "\n[3977 more bytes of output were cut]"

    @pytest.mark.parametrize("seconds", [0.01, 1.5], ids=["while it starts", "while it runs"])
    def test_cancelled_episode_ends_its_sandbox(seconds: float) -> None:
        source = python_source(timeout_s=60)

        async def episode() -> None:
            async with asyncio.timeout(seconds), source.episode() as tools:
                await run_tools(tools, [Call("python", {"code": "while True: pass"})], ToolUse())

        began = time.monotonic()
        with pytest.raises(TimeoutError):
            asyncio.run(episode())
        while (left := sandboxes()) and time.monotonic() - began < 6:
            time.sleep(0.05)
        assert not left

    def sandboxes() -> list[str]:
        """Return the processes of sandboxes that this process has started."""
        tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
        children = [Path("/proc", child) for task in tasks for child in (task / "children").read_text().split()]
        return [child.name for child in children if "sandbox" in (child / "cmdline").read_text()]


# --- retrieval --------------------------------------------------------------------------------------------------------

PASSAGES = ["The fox is quick and brown.", "Paris is the capital of France.", "Berlin is the capital of Germany.", "  "]


def corpora(folder: Path) -> dict[str, dict[str, Any]]:
    """Write the passages as each kind of corpus, and return the settings."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"id": number, "body": text} for number, text in enumerate(PASSAGES)]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    parquet.write_table(pa.Table.from_pylist(rows), folder / "docs.parquet")
    (folder / "docs" / "more").mkdir(parents=True)
    for number, text in enumerate(PASSAGES):
        (folder / "docs" / ("more" if number > 1 else "") / f"{number}.txt").write_text(text)
    (folder / "docs" / "picture.png").write_bytes(b"\x89")
    return {
        "docs.jsonl": {"corpus": folder / "docs.jsonl", "column": "body"},
        "docs.parquet": {"corpus": folder / "docs.parquet", "column": "body"},
        "docs": {"corpus": folder / "docs"},
    }


def test_retrieval_finds_the_passages_that_fit(tmp_path: Path) -> None:
    for options in corpora(tmp_path).values():
        source = ToolSource(ToolSettings.model_validate({"tools": [{"name": "retrieval", "results": 1, **options}]}))
        said = ask(
            source,
            Call("search", {"query": "capital of France?"}),
            Call("search", {"query": "capital", "results": 7}),
            Call("search", {"query": "zebra"}),
            Call("search", {"query": ""}),
        )
        assert said[0] == "[1] Paris is the capital of France."
        assert {line[4:] for line in said[1].split("\n\n")} == {PASSAGES[1], PASSAGES[2]}
        assert said[2:] == ["Nothing was found."] * 2


def test_corpus_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "corpus.csv").write_text("a")
    (tmp_path / "fake.parquet").write_text("a")
    for name, said in {
        "no.jsonl": "no.jsonl does not exist",
        "bad.jsonl": "line 2 of the corpus has no text 'text'; it has body",
        "broken.jsonl": "broken.jsonl cannot be read: JSONDecodeError",
        "empty.jsonl": "empty.jsonl holds no text",
        "corpus.csv": "corpus.csv is neither a .jsonl or .parquet file nor a folder",
        "fake.parquet": "fake.parquet cannot be read: ArrowInvalid",
    }.items():
        with pytest.raises(ConfigError, match=said):
            ToolSource(ToolSettings.model_validate({"tools": [{"name": "retrieval", "corpus": tmp_path / name}]}))


# --- functions and objects --------------------------------------------------------------------------------------------

TOOLS = '''
from rlcore_agents.tools import ToolFailure
closed = []

def shout(text: str) -> str:
    """Shout."""
    return text.upper()

class Counter:
    """Count."""
    def __init__(self, start: int = 0): self.total = start
    async def __call__(self, by: int) -> int:
        self.total += by
        return self.total
    async def close(self): closed.append(self.total)

class Broken:
    """Break."""
    def __init__(self, start: int = 0):
        if Broken.works: Broken.works = False
        else: raise OSError("no such device")
    works = True
    def __call__(self) -> None: ...

number = 3
class Silent: pass
def untyped(x):
    """Do."""
'''


def test_objects_belong_to_an_episode_and_are_closed_with_it(tmp_path: Path) -> None:
    file = tmp_path / "my_tools.py"
    file.write_text(TOOLS)
    options = [f"{file}:shout", {"path": f"{file}:Counter", "kwargs": {"start": 10}, "name": "tally"}]
    source = ToolSource(ToolSettings.model_validate({"tools": options}))

    for _ in range(2):
        calls = [Call("tally", {"by": 1}), Call("tally", {"by": 2}), Call("shout", {"text": "a"})]
        assert ask(source, *calls) == ["11", "13", "A"]
    assert sys.modules["rlcore_user_my_tools"].closed == [10, 13, 13]  # the first one was made for its signature


def test_tools_that_cannot_be_made_are_named_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "my_tools.py"
    file.write_text(TOOLS)
    for tools, said in [
        ([f"{file}:shuot"], "has no 'shuot'"),
        ([f"{tmp_path}/none.py:shout"], "none.py does not exist"),
        ([f"{file}:number"], "neither a class nor a function"),
        ([f"{file}:Silent"], "has no __call__"),
        ([f"{file}:untyped"], "parameter 'x' has no type hint"),
        ([{"path": f"{file}:shout", "kwargs": {"a": 1}}], "kwargs are for classes"),
        ([f"{file}:shout", {"path": f"{file}:shout"}], "several tools have the name shout"),
        ([{"path": f"{file}:Counter", "kwargs": {"begin": 1}}], "cannot be made: TypeError"),
    ]:
        with pytest.raises((ConfigError, ToolFailure), match=said):
            ToolSource(ToolSettings.model_validate({"tools": tools}))
    with pytest.raises(ToolFailure, match="no such device"):
        ask(ToolSource(ToolSettings(tools=(FunctionSettings(path=f"{file}:Broken"),))))


def test_settings_say_what_a_tool_can_be() -> None:
    for tools, said in [
        (["calc"], r"a tool is calculator, python, \{name: retrieval"),
        ([{"name": "retrieval"}], "Field required"),
        ([{"name": "python", "limit": {}}], "did you mean limits"),
    ]:
        with pytest.raises(ValidationError, match=said):
            ToolSettings.model_validate({"tools": tools})
