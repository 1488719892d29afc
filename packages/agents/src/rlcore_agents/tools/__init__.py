"""Tools that the policy calls: Python functions, MCP servers, and those that ship with this package."""

from rlcore_agents.tools.function import function_tool
from rlcore_agents.tools.run import ToolUse, run_tools
from rlcore_agents.tools.tool import BadArguments, Tool, ToolError, ToolFailure

__all__ = ["BadArguments", "Tool", "ToolError", "ToolFailure", "ToolUse", "function_tool", "run_tools"]
