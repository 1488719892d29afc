"""Tools of MCP servers: real ones by the SDK over stdio and HTTP, one without the SDK, and broken ones."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlcore.errors import ConfigError
from rlcore_agents.tools import ToolFailure, ToolUse, run_tools
from rlcore_agents.tools.settings import ToolSettings
from rlcore_agents.tools.source import ToolSource
from rlcore_kit.serving.ports import unused_port

HERE = Path(__file__).parent
SDK_SERVER = [sys.executable, str(HERE / "mcp_server.py")]
PLAIN_SERVER = [sys.executable, str(HERE / "stdio_server.py")]


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any] | None
    error: str = ""
    id: str = "call00001"


Open = Callable[..., ToolSource]


@pytest.fixture
def opened() -> Iterator[Open]:
    sources: list[ToolSource] = []

    def open_(**server: Any) -> ToolSource:
        sources.append(ToolSource(ToolSettings.model_validate({"mcp": [server]})))
        return sources[-1]

    yield open_
    for source in sources:
        source.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = unused_port()
    process = subprocess.Popen([*SDK_SERVER, str(port)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    process.wait()


def ask(source: ToolSource, *names: str, **arguments: Any) -> list[str]:
    """Make calls together in one episode, each in a new event loop."""

    async def episode() -> list[str]:
        async with source.episode() as tools:
            calls = [Call(name, arguments) for name in names]
            return [message["content"] for message in await run_tools(tools, calls, ToolUse())]

    return asyncio.run(episode())


def test_tools_of_a_server_over_stdio_are_discovered_and_called(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    source = opened(command=SDK_SERVER, prefix="test_", env={"GIVEN": "yes"})

    async def schema() -> Any:
        async with source.episode() as tools:
            return tools[0].schema()["function"]

    add = asyncio.run(schema())
    assert (add["name"], add["description"]) == ("test_add", "Add two numbers.")
    assert add["parameters"]["properties"]["a"]["type"] == "integer"
    assert ask(source, "test_add", a=1, b=2) == ["3"]
    # one server for all episodes, which does not see the environment variables of the run
    counts = [ask(source, "test_count")[0] for _ in range(2)]
    assert counts == [f"call {number} of a server with SECRET=None, GIVEN=yes" for number in (1, 2)]
    [failed, wrong] = [ask(source, "test_fail")[0], ask(source, "test_add", a="x")[0]]
    assert failed == "Error: Error executing tool fail: no such page"
    assert wrong.startswith("Error: ")
    assert "valid integer" in wrong
    assert ask(source, "test_picture") == ["[content of type image, which is not supported]"]


def test_tools_of_a_server_over_http(opened: Open, url: str) -> None:
    source = opened(url=url, only=["count", "add"], headers={"X-Trace": "1"})
    assert ask(source, "add", a=2, b=3) == ["5"]
    assert ask(source, "add", "count", "hang", a=2, b=3)[2].startswith("Error: there is no tool 'hang'")


def test_a_server_that_does_not_answer_costs_its_episode_alone(opened: Open, url: str) -> None:
    source = opened(url=url, timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(ToolFailure, match=rf"MCP server '{url}': it did not answer a call of 'hang' within 0.3 s"):
        ask(source, "hang")
    assert time.monotonic() - began < 5
    assert ask(source, "add", a=2, b=3) == ["5"]


def test_a_server_that_dies_costs_its_episode_and_is_started_again(opened: Open) -> None:
    source = opened(command=PLAIN_SERVER)
    assert ask(source, "count1") == ["1"]
    with pytest.raises(ToolFailure, match=r"stdio_server.py': it is gone, in a call of 'count2' \(Connection closed\)"):
        ask(source, "count2")
    assert ask(source, "count1") == ["1"]


def test_every_episode_can_have_another_server(opened: Open) -> None:
    source = opened(command=PLAIN_SERVER, scope="episode")
    assert ask(source, "count1", "count1") in (["1", "2"], ["2", "1"])
    assert ask(source, "count1") == ["1"]
    shared = opened(command=PLAIN_SERVER)
    assert [ask(shared, "count1"), ask(shared, "count1")] == [["1"], ["2"]]


def test_servers_end_with_their_source(opened: Open) -> None:
    source = opened(command=PLAIN_SERVER)
    (connection,) = source._connections.values()
    source.close()
    assert connection._served.done()
    with pytest.raises(ToolFailure, match="the connection is closed"):
        asyncio.run(asyncio.wait_for(connection.tools[0].call({}), 5))


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"command": ["no-such-server"]}, "MCP server 'no-such-server': there is no program 'no-such-server'"),
        ({"command": [sys.executable, "-c", "import sys; sys.exit('no key')"]}, "its last words: no key"),
        ({"command": ["echo", "hello"]}, "MCP server 'echo hello': it ended, or does not speak the protocol"),
        ({"command": ["sleep", "60"], "start_timeout_s": 0.3}, "it did not list its tools within 0.3 s"),
        ({"url": "http://127.0.0.1:9/mcp"}, "ConnectError: All connection attempts failed"),
        ({"command": PLAIN_SERVER, "only": ["count3"]}, r"it has no tool count3 \(only\); it has: count1, count2"),
        ({"command": PLAIN_SERVER, "prefix": "x" * 60}, "must have at most 64 letters"),
    ],
)
def test_a_server_that_cannot_be_used_is_named_at_the_start(opened: Open, server: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        opened(**server)


def test_two_servers_with_the_same_tools_need_a_prefix() -> None:
    server = {"command": PLAIN_SERVER}
    with pytest.raises(
        ConfigError, match="several tools have the name count1, count2; give one another name, or a prefix"
    ):
        ToolSource(ToolSettings.model_validate({"mcp": [server, server]}))
    ToolSource(ToolSettings.model_validate({"mcp": [server, server | {"prefix": "b_"}]})).close()


def test_missing_package_is_named(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ConfigError, match=r"MCP servers need the package mcp; run: pip install 'rlcore-agents\[mcp\]'"):
        opened(command=PLAIN_SERVER)


def test_settings_of_servers_are_checked() -> None:
    for server, said in [
        ({}, "either a command or a url"),
        ({"command": ["a"], "url": "http://b"}, "either a command or a url"),
        ({"url": "localhost:80"}, "does not begin with http"),
        ("ftp://x", "does not begin with http"),
        ({"command": ["a"], "scope": "run"}, "'process' or 'episode'"),
    ]:
        with pytest.raises(ValidationError, match=said):
            ToolSettings.model_validate({"mcp": [server]})
