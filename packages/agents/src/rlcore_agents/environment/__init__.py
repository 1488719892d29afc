"""Environments that users write: classes and functions that answer the policy."""

from rlcore_agents.environment.chat import BlockingChat, Chat, EpisodeTruncated
from rlcore_agents.environment.environment import Environment, Step

__all__ = ["BlockingChat", "Chat", "Environment", "EpisodeTruncated", "Step"]
