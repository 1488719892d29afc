"""A server of tools, by the official SDK: over stdio, or at a port of loopback that is the argument."""

import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer

server = MCPServer("test")
calls = 0


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def count() -> str:
    """Count the calls of this server."""
    global calls
    calls += 1
    return f"call {calls} of a server with SECRET={os.environ.get('SECRET')}, GIVEN={os.environ.get('GIVEN')}"


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("no such page")


@server.tool()
def picture() -> Image:
    """Draw."""
    return Image(data=b"\x89PNG", format="png")


@server.tool()
def hang() -> str:
    """Never answer."""
    time.sleep(60)
    return ""


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(1)


if len(sys.argv) > 1:
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
else:
    server.run("stdio")
