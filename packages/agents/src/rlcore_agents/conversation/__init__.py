"""Conversations as exact tokens: what the policy sampled is never tokenised again."""

from rlcore_agents.conversation.chat_format import ChatFormat
from rlcore_agents.conversation.reply import Reply, ToolCall
from rlcore_agents.conversation.select_format import chat_format, format_for
from rlcore_agents.conversation.settings import ConversationSettings
from rlcore_agents.conversation.tree import TokenTree, Turn

__all__ = [
    "ChatFormat",
    "ConversationSettings",
    "Reply",
    "TokenTree",
    "ToolCall",
    "Turn",
    "chat_format",
    "format_for",
]
