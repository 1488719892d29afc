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
from rlcore_agents.conversation.call_syntax import ARGUMENTS, CallSyntax, learned_syntax
from rlcore_agents.conversation.chat_format import ChatFormat, RecordedTurn, Tools
from rlcore_agents.conversation.prefix import shared_length
from rlcore_agents.conversation.reply import Message, ParsedReply
from rlcore_agents.conversation.text_tokens import SplittingTokenizer
from rlcore_agents.conversation.text_tools import SYNTAX, tools_as_text

CONTENT, REASONING, RESULT = "probe content", "probe reasoning", "probe result"
QUESTION: Message = {"role": "user", "content": "probe question"}
TOOL = {"type": "function", "function": {"name": "probe_schema", "description": "", "parameters": {"type": "object"}}}


class TemplateFormat(ChatFormat):
    """A chat template, rendered as recipes render prompts."""

    def __init__(
        self, tokenizer: SplittingTokenizer, variables: Mapping[str, Any], end_tokens: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(variables)
        self.stop_tokens = tuple(end_tokens)
        self._ends = {*self.stop_tokens, tokenizer.eos_token_id}
        self._thinking_key = bool(re.search(r"\.thinking\b|\[['\"]thinking['\"]\]", tokenizer.chat_template))
        self._tools_as_text = False
        self._start = self._text([QUESTION], (), True)
        self._takes_system = self._try([{"role": "system", "content": CONTENT}, QUESTION], CONTENT)
        syntax = self._learned_syntax()
        self._tools_as_text = syntax is None
        self._syntax = syntax or SYNTAX
        self._reasoning = self._learned_reasoning()
        calls = "as text, in the syntax of Hermes" if self._tools_as_text else "in its own syntax"
        self.name = f"the model's chat template (tool calls {calls})"

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        return self._tokenizer.encode(self._text(self._tokenizer.observations_as_text(messages), tools, True))

    def parse(self, prompt: Sequence[int], sampled: Sequence[int], tools: Tools = ()) -> ParsedReply:
        tokens = list(sampled)
        while tokens and tokens[-1] in self._ends:
            tokens.pop()
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        if self._reasoning is None:
            return self._syntax.parse(text)
        opening, closing = self._reasoning
        if not text.lstrip().startswith(opening):
            return self._syntax.parse(text)
        reasoning, closed, answer = text.lstrip().removeprefix(opening).partition(closing)
        parsed = self._syntax.parse(answer.lstrip("\n")) if closed else ParsedReply("")
        return replace(parsed, reasoning=reasoning.strip("\n"))

    def continuation(self, turn: RecordedTurn, new: Sequence[Message]) -> list[int] | None:
        """Return the difference that ``new`` messages make to the template's text, from the end of the reply.

        The reply's texts are replaced by marks, and the template must keep every character up to them: the prompt as
        it was, reasoning and content where the policy wrote them. So the tokens that it sampled are what the template
        shows of the reply, however it would have spaced or quoted them.
        """
        if any(message.get("role") == "assistant" for message in new):
            return None
        marked = _marked(turn.message)
        messages = [*self._tokenizer.observations_as_text([*turn.messages, marked, *new])]
        until = len(turn.messages)
        try:
            before = self._text(messages[:until], turn.tools, True)
            closed = self._text(messages[: until + 1], turn.tools, False)
            whole = self._text(messages, turn.tools, True)
        except DataError:
            return None
        marks = [mark for mark in (REASONING, CONTENT) if mark in json.dumps(marked)]
        end = self._end_of_reply(closed, marks, turn)
        if end is None or not closed.startswith(before) or whole[:end] != closed[:end]:
            return None
        if any(whole.count(mark) != 1 for mark in marks):
            return None
        rest = whole[end:]
        last = turn.sampled[-1] if turn.sampled else None
        if last in self._ends:
            stop = self._tokenizer.decode([last], skip_special_tokens=False)
            if not rest.startswith(stop):
                return None
            rest = rest[len(stop) :]
        return self._tokenizer.encode(rest)

    def _end_of_reply(self, closed: str, marks: Sequence[str], turn: RecordedTurn) -> int | None:
        """Return where, in the text of a closed conversation, the last token of the reply belongs."""
        stops = [
            self._tokenizer.decode([token], skip_special_tokens=False) for token in self._ends if token is not None
        ]
        ended = bool(turn.sampled) and turn.sampled[-1] in self._ends
        if not ended and marks and not turn.message.get("tool_calls"):
            return closed.rindex(marks[-1]) + len(marks[-1]) if marks[-1] in closed else None
        return max((closed.rfind(stop) for stop in stops if closed.rstrip().endswith(stop)), default=len(closed))

    def _text(self, messages: Sequence[Message], tools: Tools, generate: bool) -> str:
        """Return the text of a conversation, up to where a reply begins if ``generate``."""
        messages = [_plain(message) for message in messages]
        if self._tools_as_text:
            messages, tools = tools_as_text(messages, tools, self._takes_system), ()
        with boundary("the chat template fails on this conversation"):
            text = self._tokenizer.apply_chat_template(
                [self._templated(message) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=generate,
                **self._variables,
            )
        if not isinstance(text, str):
            raise DataError(f"the chat template returns {type(text).__name__} for this conversation, not text")
        return text

    def _templated(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``message`` as templates read it: arguments as objects, and gpt-oss' name for reasoning."""
        written = dict(message)
        if self._thinking_key and written.get("reasoning_content"):
            written["thinking"] = written["reasoning_content"]
        if written.get("tool_calls"):
            written["tool_calls"] = [_object_arguments(call) for call in written["tool_calls"]]
        return written

    def _try(self, messages: Sequence[Message], *expected: str, tools: Tools = ()) -> bool:
        """Return whether the template writes this conversation with every ``expected`` text."""
        try:
            text = self._text(messages, tools, False)
        except DataError:
            return False
        return all(each in text for each in expected)

    def _reply(self, message: Message) -> str | None:
        """Return what the template writes of a reply, from the end of the generation prompt."""
        try:
            text = self._text([QUESTION, message], (), False)
        except DataError:
            return None
        return text[shared_length(text, self._start) :]

    def _learned_syntax(self) -> CallSyntax | None:
        """Return how the template writes tools, or None if it does not write schemas, calls and results."""
        ends = [self._tokenizer.decode([token], skip_special_tokens=False) for token in self._ends if token is not None]
        syntax = learned_syntax(lambda names: self._reply(_calls(names)), ends)
        answered = [QUESTION, _calls(["probe_tool"]), {"role": "tool", "tool_call_id": "probe0000", "content": RESULT}]
        known = self._try(answered, RESULT) and self._try([QUESTION], "probe_schema", tools=[TOOL])
        return syntax if known else None

    def _learned_reasoning(self) -> tuple[str, str] | None:
        """Return the marks around reasoning, the first "" if the generation prompt has it; None if there are none."""
        text = self._reply({"role": "assistant", "content": CONTENT, "reasoning_content": REASONING})
        if text is None or REASONING not in text or CONTENT not in text:
            return None
        opening, _, rest = text.partition(REASONING)
        return opening.strip(), rest.partition(CONTENT)[0].strip()


def _calls(names: Sequence[str]) -> Message:
    """Return a reply that calls the tools of these names."""
    calls = [
        {"id": f"probe{place:04d}", "type": "function", "function": {"name": name, "arguments": ARGUMENTS}}
        for place, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _marked(message: Message) -> dict[str, Any]:
    """Return a reply with marks in place of its reasoning and content, those within its content too."""
    marked = dict(message)
    content = marked.get("content") or ""
    if marked.get("reasoning_content"):
        marked["reasoning_content"] = REASONING
    if "</think>" in content:
        marked["content"] = f"<think>{REASONING}</think>{CONTENT}"
    elif content:
        marked["content"] = CONTENT
    return marked


def _plain(message: Message) -> dict[str, Any]:
    """Return ``message`` with its content as text and without null fields."""
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        texts = [part.get("text") for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"a message of the role {message.get('role')!r} has parts that are not text, which the chat template "
                "of this model cannot show"
            )
        content = "".join(texts)
    kept = {key: value for key, value in message.items() if value is not None}
    return {**kept, "content": content or ""}


def _object_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        with suppress(ValueError, RecursionError):  # a malformed call is shown as it is
            function["arguments"] = json.loads(function["arguments"] or "{}")
    return {**call, "function": function}
