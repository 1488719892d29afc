"""The chat format of a model's own chat template, for models without a hand-written renderer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import DataError
from rlcore_agents.conversation.chat_format import ChatFormat, RecordedTurn, Tools
from rlcore_agents.conversation.handwritten import LibraryCalls
from rlcore_agents.conversation.reply import Message, ParsedReply
from rlcore_agents.conversation.template_syntax import CALL, CONTENT, REASONING, TemplateSyntax
from rlcore_agents.conversation.text_tokens import SplittingTokenizer
from rlcore_agents.conversation.text_tools import tools_as_text


class TemplateFormat(ChatFormat):
    """A chat template, rendered as recipes render prompts."""

    def __init__(
        self, tokenizer: SplittingTokenizer, variables: Mapping[str, Any], end_tokens: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(variables)
        self._thinking_key = bool(re.search(r"\.thinking\b|\[['\"]thinking['\"]\]", tokenizer.chat_template))
        ends = {*end_tokens, tokenizer.eos_token_id} - {None}
        self._syntax = TemplateSyntax(self._written, [tokenizer.text([token]) for token in ends])
        last = {tokens[-1] for end in self._syntax.ends if (tokens := tokenizer.encode(end))}
        ends |= {token for token in last if tokenizer.is_added(token)}
        self._ends = {token: tokenizer.text([token]) for token in sorted(ends)}
        self.stop_tokens = tuple(self._ends)
        parser = self._syntax.parser if self._syntax.knows_tools else ""
        self._calls = LibraryCalls(tokenizer, parser) if parser else self._syntax.calls
        calls = "in its own syntax" if self._syntax.knows_tools else "as text, in the syntax of Hermes"
        self.name = f"the model's chat template (tool calls {calls})"

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        return self._tokenizer.encode(self._text(self._tokenizer.observations_as_text(messages), tools, True))

    def parse(self, prompt: Sequence[int], sampled: Sequence[int], tools: Tools = ()) -> ParsedReply:
        tokens = list(sampled)
        while tokens and tokens[-1] in self._ends:
            tokens.pop()
        syntax = self._syntax
        text, reasoning = self._tokenizer.text(tokens), None
        if syntax.closing and text.lstrip().startswith(syntax.opening):
            reasoning, _, text = text.lstrip().removeprefix(syntax.opening).partition(syntax.closing)
            reasoning, text = reasoning.strip("\n"), text.lstrip("\n")
        text = text.removeprefix(syntax.answer)
        parsed = self._calls.parse(text) if tools else ParsedReply(text)
        return replace(parsed, reasoning=reasoning)

    def continuation(self, turn: RecordedTurn, new: Sequence[Message]) -> list[int] | None:
        """Return the difference that ``new`` messages make to the template's text, from the end of the reply.

        Marks replace the reasoning, the content and the arguments of the reply. The template must write the prompt as
        it was, each mark once after it, and then the end of the reply. So the sampled tokens are what it shows of the
        reply, however it would have spaced or quoted them.
        """
        if any(message.get("role") == "assistant" for message in new):
            return None
        reply, marks = _marked(turn.message)
        messages = self._tokenizer.observations_as_text([*turn.messages, reply, *new])
        try:
            before = self._text(messages[: len(turn.messages)], turn.tools, True)
            whole = self._text(messages, turn.tools, True)
        except DataError:
            return None
        if not whole.startswith(before) or any(whole.count(mark) != 1 for mark in marks):
            return None
        last = max((whole.index(mark) + len(mark) for mark in marks), default=len(before))
        if last < len(before):
            return None
        stop = self._ends.get(turn.sampled[-1], "") if turn.sampled else ""
        if not stop and CALL not in marks and marks:  # cut off in its text
            return self._tokenizer.encode(whole[last:])
        ends = [place for end in ([stop] if stop else self._ends.values()) if (place := whole.find(end, last)) >= 0]
        if not ends or (CALL not in marks and whole[last : min(ends)].strip()):
            return None
        return self._tokenizer.encode(whole[min(ends) + len(stop) :])

    def _text(self, messages: Sequence[Message], tools: Tools, generate: bool) -> str:
        """Return the text of a conversation, up to where a reply begins if ``generate``."""
        if self._syntax.knows_tools:
            return self._written(messages, tools, generate)
        return self._written(tools_as_text(messages, tools, self._syntax.takes_system), (), generate)

    def _written(self, messages: Sequence[Message], tools: Tools, generate: bool) -> str:
        """Return what the template makes of messages.

        Raises:
            DataError: it refuses them.
        """
        with boundary("the chat template fails on this conversation"):
            text = self._tokenizer.apply_chat_template(
                [self._as_templates_read(message) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=generate,
                **self._variables,
            )
        if not isinstance(text, str):
            raise DataError(f"the chat template returns {type(text).__name__} for this conversation, not text")
        return text

    def _as_templates_read(self, message: Message) -> dict[str, Any]:
        """Return ``message`` with arguments as objects, and with gpt-oss' name for reasoning where that is read."""
        written = dict(message)
        if self._thinking_key and written.get("reasoning_content"):
            written["thinking"] = written["reasoning_content"]
        if written.get("tool_calls"):
            written["tool_calls"] = [_object_arguments(call) for call in written["tool_calls"]]
        return written


def _marked(message: Message) -> tuple[dict[str, Any], list[str]]:
    """Return a reply with marks in place of its texts, and the marks; reasoning may be part of the content."""
    marked, marks = dict(message), []
    content = marked.get("content") or ""
    if marked.get("reasoning_content"):
        marked["reasoning_content"] = REASONING
        marks.append(REASONING)
    if "</think>" in content:
        marked["content"] = f"<think>{REASONING}</think>{CONTENT}"
        marks += [REASONING, CONTENT]
    elif content:
        marked["content"] = CONTENT
        marks.append(CONTENT)
    if calls := marked.get("tool_calls"):
        last = {**calls[-1], "function": {**calls[-1]["function"], "arguments": {CALL: 1}}}
        marked["tool_calls"] = [*calls[:-1], last]
        marks.append(CALL)
    return marked, list(dict.fromkeys(marks))


def _object_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        with suppress(ValueError, RecursionError):  # a malformed call is shown as it is
            function["arguments"] = json.loads(function["arguments"] or "{}")
    return {**call, "function": function}
