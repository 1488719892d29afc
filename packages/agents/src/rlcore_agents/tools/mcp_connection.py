"""MCP servers by the official SDK: a connection to one, and its tools.

A connection belongs to one task of one event loop, which is not that of an episode: those come and go.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from functools import partial
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TextIO

from pydantic_core import to_json

from rlcore.boundary import reason
from rlcore.errors import ConfigError
from rlcore_agents.tools.settings import McpServer
from rlcore_agents.tools.tool import Tool, ToolError, ToolFailure

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult, ContentBlock
    from mcp.types import Tool as ServerTool

END_S = 10.0
"""Seconds that a server has to end."""


class EventLoop:
    """An event loop in a daemon thread, for all connections of a process; it starts with its first use."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the running loop."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                Thread(target=self._loop.run_forever, name="MCP connections", daemon=True).start()
            return self._loop


LOOP = EventLoop()
# the SDK logs tracebacks of what is answered as one sentence here
logging.getLogger("mcp").addHandler(logging.NullHandler())


class McpConnection:
    """A connection to a server.

    Attributes:
        tools: of the server, as configured.
        lost: why it can no longer be used; "" while it can.
    """

    def __init__(self, server: McpServer) -> None:
        self.tools: list[Tool] = []
        self.lost = ""
        self._server = server
        self._loop = LOOP.get()
        self._opened: Future[None] = Future()
        self._stop = asyncio.Event()
        # what the server says on standard error; closed by `_serve`
        self._log: TextIO = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._served = asyncio.run_coroutine_threadsafe(self._serve(), self._loop)

    async def opened(self) -> None:
        """Wait until the server has listed its tools.

        Raises:
            ToolFailure: it cannot be reached or does not answer; the message says why.
        """
        await asyncio.wrap_future(self._opened)

    def wait_opened(self) -> None:
        """Do as `opened`, outside of event loops."""
        self._opened.result()

    def close(self) -> None:
        """End the connection, and a server that it started, without waiting for it."""
        self.lost = self.lost or "the connection is closed"
        self._loop.call_soon_threadsafe(self._stop.set)

    def wait_closed(self) -> None:
        """End the connection and wait until a server that it started has ended."""
        self.close()
        with suppress(Exception):
            self._served.result(END_S)

    async def _serve(self) -> None:
        """Hold the connection until `close`."""
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(self._server.start_timeout_s):
                    client = await stack.enter_async_context(_client(self._server, self._log))
                    listed = await _listed(client)
                self.tools = [self._tool(client, tool) for tool in _wanted(self._server, listed)]
                self._opened.set_result(None)
                await self._stop.wait()
        except BaseException as error:  # groups of errors too, which a transport raises
            self.lost = self.lost or _why(error)
            if not self._opened.done():
                self._opened.set_exception(self._failure(self._said(_why(error, self._server.start_timeout_s))))
        finally:
            self._log.close()

    def _failure(self, what: str) -> ToolFailure:
        return ToolFailure(f"{self._server.title}: {what}")

    def _said(self, why: str) -> str:
        """Return ``why`` with the last line that the server wrote to standard error."""
        self._log.seek(0)
        lines = [line for line in self._log.read()[-4000:].splitlines() if line.strip()]
        return f"{why} (its last words: {lines[-1].strip()[:200]})" if lines else why

    def _tool(self, client: Client, tool: ServerTool) -> Tool:
        return Tool(
            f"{self._server.prefix}{tool.name}",
            tool.description or tool.name,
            tool.input_schema,
            partial(self._call, client, tool.name),
            self._server.timeout_s + 5,  # the server's own timeout comes first
            self._server.max_characters,
        )

    async def _call(self, client: Client, name: str, arguments: dict[str, Any]) -> str:
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        if self.lost:
            raise self._failure(self.lost)
        call = asyncio.run_coroutine_threadsafe(client.call_tool(name, arguments), self._loop)
        try:
            result = await asyncio.wait_for(asyncio.wrap_future(call), self._server.timeout_s)
        except TimeoutError:
            self.lost = f"it did not answer a call of {name!r} within {self._server.timeout_s:g} s"
            raise self._failure(self.lost) from None
        except MCPError as error:
            if error.code != CONNECTION_CLOSED and "timed out" not in str(error):
                raise ToolError(str(error)) from None  # an answer of the server, for the policy
            self.lost = f"it is gone, in a call of {name!r} ({error})"
            raise self._failure(self.lost) from None
        except Exception as error:
            self.lost = f"a call of {name!r} failed ({_why(error)})"
            raise self._failure(self.lost) from None
        return _text(result)


def _client(server: McpServer, log: TextIO) -> AbstractAsyncContextManager[Client]:
    try:
        import mcp
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client
    except ImportError:
        raise ConfigError("MCP servers need the package mcp; run: pip install 'rlcore-agents[mcp]'") from None
    if server.url:
        http = create_mcp_http_client(headers=dict(server.headers)) if server.headers else None
        transport = streamable_http_client(server.url, http_client=http)
    else:
        program, *arguments = server.command
        parameters = mcp.StdioServerParameters(command=program, args=arguments, env=dict(server.env))
        transport = mcp.stdio_client(parameters, errlog=log)
    return mcp.Client(transport)


async def _listed(client: Client) -> list[ServerTool]:
    page = await client.list_tools()
    tools = list(page.tools)
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        tools += page.tools
    return tools


def _wanted(server: McpServer, tools: list[ServerTool]) -> list[ServerTool]:
    names = [tool.name for tool in tools]
    if missing := [name for name in server.only if name not in names]:
        raise ConfigError(f"it has no tool {', '.join(missing)} (only); it has: {', '.join(names) or 'none'}")
    return [tool for tool in tools if not server.only or tool.name in server.only]


def _why(error: BaseException, timeout_s: float | None = None) -> str:
    """Return one reason out of an error or a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, TimeoutError) and timeout_s is not None:
        return f"it did not list its tools within {timeout_s:g} s"
    if isinstance(error, FileNotFoundError):
        return f"there is no program {error.filename!r}"
    if type(error).__name__ == "MCPError":
        return f"it ended, or does not speak the protocol ({error})"
    return reason(error)


def _text(result: CallToolResult) -> str:
    """Return what a server answered as text.

    Raises:
        ToolError: the server says that the call failed.
    """
    text = "\n".join(map(_text_of, result.content))
    if not result.content and result.structured_content is not None:
        text = to_json(result.structured_content).decode()
    if result.is_error:
        raise ToolError(text or "the call failed")
    return text


def _text_of(block: ContentBlock) -> str:
    if block.type == "text":
        return block.text
    if block.type == "resource" and hasattr(block.resource, "text"):
        return str(block.resource.text)
    if block.type == "resource_link":
        return f"[link to {block.uri}]"
    return f"[content of type {block.type}, which is not supported]"
