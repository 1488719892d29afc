"""Replies of the policy: content, reasoning and tool calls of sampled tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlcore.engines.rollout import FinishReason
from rlcore.errors import DataError

Message = Mapping[str, Any]
NAME = re.compile(r'"name"\s*:\s*("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True)
class ToolCall:
    """One call that the policy made, or tried to make.

    Attributes:
        id: names the call in its tool message; nine letters and digits, as Mistral's templates demand.
        name: of the tool; "" if the reply does not say.
        arguments: by name; None if the call is malformed.
        error: what is wrong with the call, as a sentence for the policy; "" if nothing is.
        raw: text of the call as it was sampled.
    """

    id: str
    name: str
    arguments: dict[str, Any] | None
    error: str = ""
    raw: str = ""

    def as_message(self) -> dict[str, Any]:
        """Return the call as an entry of ``tool_calls``; a malformed one keeps its text as arguments."""
        arguments = self.raw if self.arguments is None else json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class ParsedCall:
    """A call in the text of a reply; fields as in `ToolCall`."""

    name: str
    arguments: dict[str, Any] | None
    error: str = ""
    raw: str = ""
    id: str | None = None


@dataclass(frozen=True)
class ParsedReply:
    """What sampled tokens say.

    Attributes:
        content: text of the answer; malformed calls that name no tool are part of it, as they were sampled.
        reasoning: text of the reasoning; None without any.
    """

    content: str
    reasoning: str | None = None
    calls: Sequence[ParsedCall] = ()


@dataclass(frozen=True)
class Reply:
    """A recorded reply of the policy.

    Attributes:
        message: as OpenAI's chat completions have it, with ``content``, and ``reasoning_content`` and ``tool_calls``
            where there are any. Malformed calls are in ``tool_calls`` if they name a tool, else in ``content``.
        tool_calls: every call, malformed ones too.
        turn: number of the reply in its tree.
    """

    message: dict[str, Any]
    tool_calls: list[ToolCall]
    finish_reason: FinishReason
    turn: int

    @property
    def text(self) -> str:
        """The answer, without reasoning and calls of tools."""
        content: str = self.message["content"]
        return content


def plain(message: Message) -> dict[str, Any]:
    """Return ``message`` with its content as text and without null fields.

    Raises:
        DataError: it has no role, or its content has an image or another part that is not text.
    """
    if not isinstance(message.get("role"), str):
        raise DataError(f"a message has no role: {message!r:.200}")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"a message of the role {message.get('role')!r} has parts that are not text, which "
                "conversations cannot show the policy"
            )
        content = "".join(map(str, texts))
    kept = {key: value for key, value in message.items() if value is not None}
    return {**kept, "content": content or ""}


def call_of_json(text: str) -> ParsedCall:
    """Return the call that the JSON object ``text`` describes, malformed or not."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        name = NAME.search(text)
        try:
            named = json.loads(name.group(1)) if name else ""
        except ValueError:
            named = ""
        return ParsedCall(named, None, f"the tool call is not valid JSON ({error}); nothing was called", text)
    return call_of(value, text)


def call_of(value: Any, raw: str) -> ParsedCall:
    """Return the call that ``value``, an object with a name and arguments, describes."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return ParsedCall("", None, 'the tool call has no "name"; nothing was called', raw)
    arguments = value.get("arguments", value.get("parameters"))
    return checked_call(value["name"], {} if arguments is None else arguments, raw)


def checked_call(name: str, arguments: Any, raw: str, id: str | None = None) -> ParsedCall:
    """Return the call with its arguments as an object, or with an error if they are none."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            return ParsedCall(name, None, f"the arguments of {name} are not valid JSON ({error})", raw, id)
    if not isinstance(arguments, dict):
        return ParsedCall(name, None, f"the arguments of {name} must be a JSON object, not {arguments!r:.100}", raw, id)
    return ParsedCall(name, arguments, raw=raw, id=id)
