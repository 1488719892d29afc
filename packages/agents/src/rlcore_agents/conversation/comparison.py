"""Whether messages are those of a recorded conversation, as clients send them back.

Two messages are the same if the policy would have been shown the same: a content of None, "" or no content is empty, a
list of text parts is their text, arguments of tool calls are compared as JSON values, fields that are null count as
absent. Clients of protocols without reasoning lose that of the policy's replies: a reply that comes back without
reasoning is the reply, one with other reasoning is not. Fields of a reply that no chat template reads (``refusal``,
``annotations``, …) do not matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from rlcore_agents.conversation.reply import Message


class Comparable(NamedTuple):
    """A message in the form in which it is compared; two that differ in ``reasoning`` alone may be the same."""

    role: str
    content: str
    fields: str
    reasoning: str | None


def comparable(message: Message) -> Comparable:
    """Return ``message`` in the form in which `same` compares it."""
    role = str(message.get("role"))
    if role != "assistant":
        fields = {key: value for key, value in message.items() if value is not None and key not in ("role", "content")}
        return Comparable(role, _content(message.get("content")), _json(fields), None)
    reasoning = message.get("reasoning_content") or message.get("reasoning") or None
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    return Comparable(role, _content(message.get("content")), _json(calls), reasoning)


def extends(messages: Sequence[Comparable], recorded: Sequence[Comparable]) -> bool:
    """Return whether ``messages`` begin with ``recorded``."""
    if len(messages) < len(recorded):
        return False
    equal = messages[: len(recorded)] == recorded  # fast, and usual
    return equal or all(same(ours, theirs) for ours, theirs in zip(recorded, messages))


def same(recorded: Comparable, sent: Comparable) -> bool:
    """Return whether ``sent`` is the message ``recorded``, with its reasoning or without any."""
    return recorded[:3] == sent[:3] and sent.reasoning in (None, recorded.reasoning)


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(str(part["text"]) for part in content)
    return _json(content)


def _call(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments")
    with suppress(ValueError, RecursionError):  # a malformed call keeps its text
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
    return [call.get("id"), function.get("name"), arguments] if isinstance(call, Mapping) else call


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)
