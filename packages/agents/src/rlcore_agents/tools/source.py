"""The configured tools: checked and connected once per process, opened for every episode."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import ConfigError
from rlcore_agents.environment.loading import load_callable
from rlcore_agents.tools.function import NAME, function_tool
from rlcore_agents.tools.mcp_connection import LOOP, McpConnection
from rlcore_agents.tools.settings import (
    FunctionSettings,
    InterpreterSettings,
    McpServer,
    RetrievalSettings,
    ToolEntry,
    ToolSettings,
)
from rlcore_agents.tools.shipped.calculator import calculator_tool
from rlcore_agents.tools.shipped.python import python_tool
from rlcore_agents.tools.shipped.retrieval import retrieval_tool
from rlcore_agents.tools.thread import in_thread
from rlcore_agents.tools.tool import Tool, ToolFailure
from rlcore_kit.sandbox.detection import working_way
from rlcore_kit.sandbox.session import SandboxError

Opener = Callable[[AsyncExitStack], Any]


class ToolSource:
    """Gives the tools of an environment's settings, to many episodes at the same time.

    Raises:
        ConfigError: a tool cannot be made (no such function, corpus or server; no sandbox), or two have one name.
    """

    def __init__(self, settings: ToolSettings) -> None:
        self._shared: list[Tool] = []
        self._interpreters: list[InterpreterSettings] = []
        self._objects: list[tuple[FunctionSettings, type]] = []
        self._connections: dict[int, McpConnection] = {}
        self._servers = settings.mcp
        for entry in settings.tools:
            self._add(entry)
        try:
            self._check(self._tools_of_servers())
        except BaseException:
            self.close()
            raise

    def _add(self, entry: ToolEntry) -> None:
        if isinstance(entry, InterpreterSettings):
            try:
                working_way()
            except SandboxError as error:
                raise ConfigError(f"tool python: {error}") from None
            self._interpreters.append(entry)
        elif isinstance(entry, RetrievalSettings):
            self._shared.append(retrieval_tool(entry.corpus, entry.column, entry.results, entry.max_characters))
        elif isinstance(entry, FunctionSettings):
            loaded = _loaded(entry)
            if isinstance(loaded, type):
                self._objects.append((entry, loaded))
            else:
                self._shared.append(_function(entry, loaded))
        else:
            self._shared.append(calculator_tool())

    def _tools_of_servers(self) -> list[Tool]:
        """Connect to every server, and return the tools of all."""
        tools = []
        for number, server in enumerate(self._servers):
            connection = McpConnection(server)
            try:
                connection.wait_opened()
            except ToolFailure as failure:
                raise ConfigError(str(failure)) from None
            tools += connection.tools
            if server.scope == "process":
                self._connections[number] = connection
            else:
                connection.close()
        return tools

    def _check(self, of_servers: list[Tool]) -> None:
        names = [tool.name for tool in (*self._shared, *of_servers)]
        names += ["python"] * len(self._interpreters)
        for entry, kind in self._objects:
            made = _made(entry, kind)
            names.append(_function(entry, made).name)
            asyncio.run_coroutine_threadsafe(_close(made), LOOP.get()).result()
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ConfigError(f"several tools have the name {', '.join(twice)}; give one another name, or a prefix")
        if odd := [name for name in names if not NAME.fullmatch(name)]:
            raise ConfigError(f"tool name {odd[0]!r} must have at most 64 letters, digits, '_' and '-'")

    @asynccontextmanager
    async def episode(self) -> AsyncIterator[list[Tool]]:
        """Give the tools of one episode; what is its own (objects, interpreters, connections) is closed with it.

        Raises:
            ToolFailure: an object cannot be made, or a server cannot be reached.
        """
        async with AsyncExitStack() as stack:
            tools = list(self._shared)
            for settings in self._interpreters:
                interpreter = python_tool(settings.limits, settings.max_characters)
                tools += [await stack.enter_async_context(interpreter)]
            for entry, kind in self._objects:
                made = await in_thread(lambda entry=entry, kind=kind: _made(entry, kind))  # type: ignore[misc]
                stack.push_async_callback(_close, made)
                tools.append(_function(entry, made))
            for number, server in enumerate(self._servers):
                tools += await self._connected(number, server, stack)
            yield tools

    async def _connected(self, number: int, server: McpServer, stack: AsyncExitStack) -> list[Tool]:
        connection = self._connections.get(number)
        if connection is None or connection.lost:
            if connection is not None:  # its server was lost in an earlier episode, and is tried again
                connection.close()
            connection = McpConnection(server)
            if server.scope == "process":
                self._connections[number] = connection
            else:
                stack.callback(connection.close)
        await connection.opened()
        return connection.tools

    def close(self) -> None:
        """End the connections that episodes share."""
        connections, self._connections = list(self._connections.values()), {}
        for connection in connections:
            connection.close()
        for connection in connections:
            connection.wait_closed()


def _loaded(entry: FunctionSettings) -> Callable[..., Any]:
    loaded = load_callable(entry.path, "tool")
    if entry.kwargs and not isinstance(loaded, type):
        raise ConfigError(f"tool {entry.path!r}: kwargs are for classes, and it is none")
    return loaded


def _function(entry: FunctionSettings, called: Callable[..., Any]) -> Tool:
    return function_tool(called, name=entry.name, timeout_s=entry.timeout_s, max_characters=entry.max_characters)


def _made(entry: FunctionSettings, kind: type) -> Any:
    """Return the object of an episode."""
    with boundary(f"tool {entry.path!r} cannot be made", ToolFailure):
        made = kind(**entry.kwargs)
    if not callable(made):
        raise ConfigError(f"tool {entry.path!r}: objects of the class cannot be called (it has no __call__)")
    return made


async def _close(made: Any) -> None:
    """Call the object's ``close``, if it has one."""
    close = getattr(made, "close", None)
    if close is None:
        return
    with boundary(f"closing tool {type(made).__name__} failed", ToolFailure):
        result = close() if inspect.iscoroutinefunction(close) else await in_thread(close)
        if inspect.isawaitable(result):
            await result
