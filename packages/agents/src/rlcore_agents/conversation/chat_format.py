"""`ChatFormat`: conversations to tokens and sampled tokens to messages, the contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlcore_agents.conversation.reply import Message, ParsedReply

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RecordedTurn:
    """A prompt of the policy and its reply.

    Attributes:
        messages: of the prompt.
        prompt: its tokens, as the policy saw them.
        sampled: tokens of the reply.
        message: the reply, as `Reply.message`.
    """

    messages: Sequence[Message]
    tools: Tools
    prompt: Sequence[int]
    sampled: Sequence[int]
    message: Message


class ChatFormat(ABC):
    """The format in which a model sees conversations; one per process, shared by all episodes.

    Attributes:
        name: which renderer it is, for people.
        stop_tokens: tokens that end a reply, besides the engine's own.
    """

    name: str
    stop_tokens: tuple[int, ...]

    @abstractmethod
    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Return the tokens of a conversation up to where the policy's reply begins.

        Raises:
            DataError: the format has no way to write this conversation.
        """

    @abstractmethod
    def parse(self, prompt: Sequence[int], sampled: Sequence[int], tools: Tools = ()) -> ParsedReply:
        """Return what the tokens ``sampled`` after ``prompt`` say. Whatever was sampled, this does not fail."""

    @abstractmethod
    def continuation(self, turn: RecordedTurn, new: Sequence[Message]) -> list[int] | None:
        """Return the tokens that follow a recorded turn when ``new`` messages continue its conversation.

        They begin right after the last sampled token and end where the next reply begins.

        Returns:
            None if the format writes the conversation differently once it goes on, for instance without the reasoning.
        """
