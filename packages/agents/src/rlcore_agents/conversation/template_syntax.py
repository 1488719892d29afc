"""How a chat template writes replies, learned from what it makes of a few known conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlcore.errors import DataError
from rlcore_agents.conversation.call_syntax import ARGUMENTS, CallSyntax, learned_syntax
from rlcore_agents.conversation.chat_format import Tools
from rlcore_agents.conversation.prefix import shared_length
from rlcore_agents.conversation.reply import Message
from rlcore_agents.conversation.text_tools import SYNTAX

# texts that no conversation has, and that no template changes
CONTENT, REASONING, CALL, RESULT = "Q7content7Q", "Q7reasoning7Q", "Q7call7Q", "Q7result7Q"
QUESTION: Message = {"role": "user", "content": "question"}
REASONED = {"role": "assistant", "content": CONTENT, "reasoning_content": REASONING}
SCHEMA = "probe_schema"
PARSERS = {"<function=": "qwen3.5", "<arg_key>": "glm"}
"""Parsers of the package ``renderers`` for calls whose arguments are not JSON, by a text that such calls contain."""
TOOL = {"type": "function", "function": {"name": SCHEMA, "description": "", "parameters": {"type": "object"}}}


class TemplateSyntax:
    """What a template writes around the parts of a reply.

    Attributes:
        knows_tools: it writes schemas, calls and results; if not, they are text (see `tools_as_text`).
        takes_system: it takes system messages.
        calls: around calls, if their arguments are JSON.
        parser: name of the parser in the package ``renderers`` that reads calls; "" if their arguments are JSON.
        opening: before reasoning; "" if the generation prompt ends with it.
        closing: between reasoning and an answer or call; "" if the template knows no reasoning.
        answer: before an answer, after ``closing``.
        ends: an answer and a call up to the tokens that end them; empty if the next message does.
    """

    opening, closing, answer = "", "", ""

    def __init__(self, written: Callable[[Sequence[Message], Tools, bool], str], ends: Sequence[str]) -> None:
        """Learn from a template.

        Args:
            written: its text of a conversation with tools, up to where a reply begins if the last argument is True.
            ends: texts of tokens that may end replies.
        """
        self._template = written
        self._start = written([QUESTION], (), True)
        self.takes_system = self._shows([{"role": "system", "content": CONTENT}, QUESTION], CONTENT)
        self._learn_reasoning()
        calls = learned_syntax(self._calls, ends)
        marked = self._calls(["probe_tool"]) or ""
        self.parser = next((parser for mark, parser in PARSERS.items() if mark in marked and calls is None), "")
        self.knows_tools = bool(calls or self.parser) and self._shows_tools()
        self.calls: CallSyntax = calls if calls and self.knows_tools else SYNTAX
        answer = (self._reply({"role": "assistant", "content": CONTENT}) or CONTENT).rstrip()
        call = (self._reply(_calling(["probe_tool"])) or "").rstrip()
        # without an end of answers, as in GLM's formats, the last token of a call is the mark that closes it
        self.ends = [] if answer.endswith(CONTENT) else [answer, call]

    def _learn_reasoning(self) -> None:
        text = self._reply(REASONED) or ""
        if REASONING in text and CONTENT in text:
            opening, _, rest = text.partition(REASONING)
            between = rest.partition(CONTENT)[0]
            calling = (self._reply({**REASONED, **_calling(["probe_tool"])}) or "").partition(REASONING)[2] or between
            closing = between[: shared_length(between, calling)]
            self.opening, self.closing = opening.strip(), closing.strip()
            self.answer = between.removeprefix(closing).strip()
            return
        tagged = self._reply({"role": "assistant", "content": f"<think>{REASONING}</think>{CONTENT}"}) or ""
        if REASONING not in tagged and CONTENT in tagged:  # the template removes reasoning from the content
            self.opening = "" if self._start.rstrip().endswith("<think>") else "<think>"
            self.closing = "</think>"

    def _calls(self, names: Sequence[str]) -> str | None:
        """Return what the template writes of calls, after the reasoning if it writes that."""
        text = self._reply({**REASONED, **_calling(names)})
        return None if text is None else text.partition(REASONING)[2].lstrip().removeprefix(self.closing) or text

    def _shows_tools(self) -> bool:
        answered = [
            QUESTION,
            _calling(["probe_tool"]),
            {"role": "tool", "tool_call_id": "probe0000", "content": RESULT},
        ]
        return self._shows(answered, RESULT) and self._shows([QUESTION], SCHEMA, [TOOL])

    def _shows(self, messages: Sequence[Message], expected: str, tools: Tools = ()) -> bool:
        """Return whether the template's text of a conversation contains ``expected``."""
        try:
            return expected in self._template(messages, tools, True)
        except DataError:
            return False

    def _reply(self, message: Message) -> str | None:
        """Return what the template writes of a reply, from the end of the generation prompt; None if it refuses it."""
        try:
            text = self._template([QUESTION, message], (), False)
        except DataError:
            return None
        return text[shared_length(text, self._start) :]


def _calling(names: Sequence[str]) -> dict[str, Any]:
    """Return a reply that calls the tools of these names."""
    calls = [
        {"id": f"probe{place:04d}", "type": "function", "function": {"name": name, "arguments": ARGUMENTS}}
        for place, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}
