"""Agents: episodes of many turns, environments, tools, and a gateway for any agent program."""

from rlcore_agents.environment import BlockingChat, Chat, Environment, EpisodeTruncated, Step

__all__ = ["BlockingChat", "Chat", "Environment", "EpisodeTruncated", "Step"]
