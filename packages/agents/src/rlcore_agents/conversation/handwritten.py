"""Chat formats of the package ``renderers``, written by hand for one family of models each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlcore.boundary import boundary, reason
from rlcore_agents.conversation.chat_format import ChatFormat, RecordedTurn, Tools
from rlcore_agents.conversation.reply import (
    Message,
    ParsedCall,
    ParsedReply,
    call_of_json,
    checked_call,
)
from rlcore_agents.conversation.text_tokens import SplittingTokenizer

UNFENCED_CALL = re.compile(r'\s*\{\s*"name"\s*:')


class HandWrittenFormat(ChatFormat):
    """A renderer of the package ``renderers``."""

    def __init__(self, renderer: Any, keeping: Any, name: str, tokenizer: SplittingTokenizer) -> None:
        """Wrap a renderer.

        Args:
            keeping: the same renderer, for conversations without reasoning: it goes on where ``renderer`` removes
                reasoning from the history.
        """
        self.renderer = renderer
        self._keeping = keeping
        self.name = f"the hand-written renderer {name}"
        self.stop_tokens = tuple(renderer.get_stop_token_ids())
        self._tokenizer = tokenizer

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        written = self._tokenizer.observations_as_text(with_tool_names(messages))
        with boundary(f"{self.name} cannot write this conversation"):
            return list(
                self.renderer.render_ids(
                    written,
                    tools=list(tools) or None,
                    add_generation_prompt=True,
                )
            )

    def parse(self, prompt: Sequence[int], sampled: Sequence[int], tools: Tools = ()) -> ParsedReply:
        try:
            parsed = self.renderer.parse_response(list(sampled), tools=list(tools) or None, prompt_ids=list(prompt))
        except Exception as error:  # whatever was sampled is a reply
            text = self._tokenizer.text(sampled)
            return ParsedReply(text, None, [ParsedCall("", None, f"the reply cannot be read ({reason(error)})", text)])
        calls = [_checked(call) for call in parsed.tool_calls]
        if not calls and tools and UNFENCED_CALL.match(parsed.content):  # Llama's calls have no marks around them
            return _reply("", None, [call_of_json(parsed.content)])
        return _reply(parsed.content, parsed.reasoning_content, calls)

    def continuation(self, turn: RecordedTurn, new: Sequence[Message]) -> list[int] | None:
        before = [*turn.prompt, *turn.sampled]
        named = with_tool_names([*turn.messages, turn.message, *new])
        renderer = self.renderer if any(map(_has_reasoning, named)) else self._keeping
        try:
            bridged = renderer.bridge_to_next_turn(
                list(turn.prompt),
                list(turn.sampled),
                self._tokenizer.observations_as_text(named)[-len(new) :],
                tools=list(turn.tools) or None,
            )
        except Exception:  # `prompt` says what it cannot write
            return None
        if bridged is None or bridged.token_ids[: len(before)] != before:
            return None
        return list(bridged.token_ids[len(before) :])


class LibraryCalls:
    """A parser of the package ``renderers`` for calls in a chat template's syntax."""

    def __init__(self, tokenizer: SplittingTokenizer, name: str) -> None:
        from renderers.parsers import get_tool_parser

        self._tokenizer = tokenizer
        self._parser = get_tool_parser(name, tokenizer)

    def parse(self, text: str) -> ParsedReply:
        """Return the content and the calls of a reply."""
        content, parsed = self._parser.extract(self._tokenizer.encode(text))
        return _reply(self._tokenizer.text(content), None, [_checked(call) for call in parsed])


def _reply(content: str, reasoning: str | None, calls: Sequence[ParsedCall]) -> ParsedReply:
    """Return a reply that has calls without a name in its content too."""
    nameless = [call.raw for call in calls if not call.name]
    return ParsedReply("\n".join(filter(None, [content, *nameless])), reasoning, calls)


def with_tool_names(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """Return ``messages`` in which tool messages name their tool: some formats write it, clients do not send it."""
    names = {
        call.get("id"): call["function"].get("name")
        for message in messages
        for call in message.get("tool_calls") or ()
        if isinstance(call.get("function"), Mapping)
    }
    return [
        {**message, "name": names[message.get("tool_call_id")]}
        if message.get("role") == "tool" and not message.get("name") and message.get("tool_call_id") in names
        else message
        for message in messages
    ]


def _has_reasoning(message: Message) -> bool:
    content = message.get("content")
    return bool(message.get("reasoning_content")) or (isinstance(content, str) and "</think>" in content)


def _checked(call: Any) -> ParsedCall:
    """Return a call of the library as ours."""
    if call.status == "invalid_json" and isinstance(call.arguments, Mapping) and call.name:
        return checked_call(call.name, dict(call.arguments), call.raw, call.id)  # GLM's strings have no quotes
    if call.status == "invalid_json":
        return call_of_json(call.raw)
    if call.status == "ok":
        return checked_call(call.name, call.arguments, call.raw, call.id)
    problem = {
        "unclosed_block": "the tool call is not closed",
        "missing_name": "the tool call names no tool",
        "unknown_tool": f"there is no tool {call.name!r}",
    }.get(str(call.status), "the tool call is malformed")
    return ParsedCall(call.name or "", None, f"{problem}; nothing was called", call.raw, call.id)
