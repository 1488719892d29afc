"""`Chat`: the policy, as environments talk to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlcore.engines.episode import PromptSample
from rlcore_agents.conversation import Reply
from rlcore_agents.environment import checks
from rlcore_agents.environment.environment import AnyTool, Message
from rlcore_agents.environment.exchange import Outcome, Policy, Request
from rlcore_agents.tools import Tool, ToolUse, function_tool, run_tools


class EpisodeTruncated(Exception):
    """A limit of the episode (turns, tokens, seconds) leaves no room for another reply.

    A function that catches it may return the score of what it got; one that does not is scored by its rewards of turns.
    """


class Chat:
    """A conversation with the policy, whose replies are trained as exactly the tokens that were sampled.

    Attributes:
        messages: the conversation so far, at first the messages of the sample. It may be replaced or changed: what then
            is not a continuation of what the policy saw becomes a branch of the trajectory.
        seed: of the episode, the only source of randomness.
        info: as `Step.info`.
        state: as `Step.state`, of the next reply alone.
    """

    def __init__(self, policy: Policy, sample: PromptSample, seed: int, max_chars: int) -> None:
        self.messages: list[dict[str, Any]] = [dict(message) for message in sample.messages]
        self.seed = seed
        self.info: dict[str, Any] = {}
        self.state: str | None = None
        self.outcome = Outcome()
        self.truncated = False
        self.tool_use = ToolUse()
        self._policy = policy
        self._max_chars = max_chars
        self._one = asyncio.Lock()
        self._last: Reply | None = None

    async def __call__(self, new: str | Sequence[Message] | None = None, tools: Sequence[AnyTool] = ()) -> Reply:
        """Append ``new`` messages (a text is one of the user), and the policy's reply to `messages`; return it.

        Args:
            tools: what the policy may call. Calls are answered until a reply calls none, which is returned.

        Raises:
            EpisodeTruncated: there is no room for a reply.
        """
        offered = [tool if isinstance(tool, Tool) else function_tool(tool) for tool in tools]
        schemas = [tool.schema() for tool in offered]
        if new is not None:
            self.messages += self.shortened(checks.messages(new, "the environment"))
        while True:
            reply = await self.complete(self.messages, schemas)
            self.messages.append(reply.message)
            if not (offered and reply.tool_calls):
                return reply
            self.messages += await run_tools(offered, reply.tool_calls, self.tool_use)

    async def complete(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Reply:
        """Return the policy's reply to a conversation, which need not be `messages`; calls wait for each other.

        Args:
            tools: schemas of tools, in OpenAI's format.

        Raises:
            EpisodeTruncated: there is no room for a reply.
        """
        async with self._one:
            state, self.state = self.state, None
            reply = None if self.truncated else await self._policy(Request(list(messages), list(tools), state))
        if reply is None:
            self.truncated = True
            raise EpisodeTruncated("a limit of the episode leaves no room for another reply")
        self._last = reply
        return reply

    def reward(self, value: float, reply: Reply | None = None) -> None:
        """Give a reward to the turn of ``reply``, by default the last one, in addition to those it has."""
        reply = reply or self._last
        if reply is None or self._last is None or reply.turn > self._last.turn:
            raise ValueError("there is no such reply in this episode to give a reward to")
        self.outcome.rewards.append((reply.turn, checks.number(value, "the reward of a turn")))

    def shortened(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return ``messages`` with long texts cut, which says so in the text and is counted."""
        return [{**message, "content": self._shortened(message.get("content"))} for message in messages]

    def _shortened(self, content: Any) -> Any:
        if isinstance(content, str) and len(content) > self._max_chars:
            self.outcome.metrics["observations_cut"] = self.outcome.metrics.get("observations_cut", 0.0) + 1
            rest = len(content) - self._max_chars
            return f"{content[: self._max_chars]}\n[… {rest} more characters]"
        if isinstance(content, list):
            return [{**part, "text": self._shortened(part["text"])} if "text" in part else part for part in content]
        return content


class BlockingChat:
    """`Chat` for plain functions, which run in a thread: every call waits for the policy."""

    def __init__(self, chat: Chat, loop: asyncio.AbstractEventLoop) -> None:
        self._chat = chat
        self._loop = loop

    @property
    def messages(self) -> list[dict[str, Any]]:
        """`Chat.messages`"""
        return self._chat.messages

    @messages.setter
    def messages(self, messages: Sequence[Message]) -> None:
        self._chat.messages = [dict(message) for message in messages]

    @property
    def seed(self) -> int:
        """`Chat.seed`"""
        return self._chat.seed

    @property
    def info(self) -> dict[str, Any]:
        """`Chat.info`"""
        return self._chat.info

    @property
    def state(self) -> str | None:
        """`Chat.state`"""
        return self._chat.state

    @state.setter
    def state(self, state: str | None) -> None:
        self._chat.state = state

    def __call__(self, new: str | Sequence[Message] | None = None, tools: Sequence[AnyTool] = ()) -> Reply:
        """Do as `Chat.__call__`."""
        return self._wait(self._chat, new, tools)

    def complete(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Reply:
        """Do as `Chat.complete`."""
        return self._wait(self._chat.complete, messages, tools)

    def reward(self, value: float, reply: Reply | None = None) -> None:
        """Do as `Chat.reward`."""
        self._chat.reward(value, reply)

    def _wait(self, method: Callable[..., Any], *arguments: Any) -> Reply:
        return asyncio.run_coroutine_threadsafe(method(*arguments), self._loop).result()  # type: ignore[no-any-return]
