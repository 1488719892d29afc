"""Agents: episodes of many turns, environments, tools, and a gateway for any agent program."""

from rlcore_agents.conversation import Reply
from rlcore_agents.environment import BlockingChat, Chat, Environment, EpisodeTruncated, Step
from rlcore_agents.tools import Tool, function_tool

__all__ = [
    "BlockingChat",
    "Chat",
    "Environment",
    "EpisodeTruncated",
    "Reply",
    "Step",
    "Tool",
    "function_tool",
]
