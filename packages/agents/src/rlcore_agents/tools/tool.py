"""What a tool is, whatever runs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlcore.errors import RlcoreError

TIMEOUT_S = 30.0
MAX_CHARACTERS = 8_000


class ToolFailure(RlcoreError):
    """What a tool needs has failed (a server, a sandbox): the episode cannot go on, and says nothing about the policy.

    Any other exception of a tool is answered to the policy.
    """


class ToolError(Exception):
    """A call failed; the message is for the policy, which sees all of it (of other exceptions, the last line)."""


class BadArguments(Exception):
    """The policy called a tool with arguments that it does not take; the message says which, for the policy."""


@dataclass(frozen=True)
class Tool:
    """One tool of an episode.

    Attributes:
        parameters: JSON schema of an object, whose properties are the arguments.
        call: takes the arguments by name. Raises `BadArguments`, or `ToolFailure`.
        timeout_s: seconds of a call.
        max_characters: characters of a result that the policy sees.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[[dict[str, Any]], Awaitable[Any]]
    timeout_s: float = TIMEOUT_S
    max_characters: int = MAX_CHARACTERS

    def schema(self) -> dict[str, Any]:
        """Return the tool as OpenAI's chat completions and chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}
