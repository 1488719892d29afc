"""How a chat template writes tool calls, learned from what it makes of calls that are known.

The arguments are JSON in every syntax here. The name is in the same JSON value (Hermes, Llama 3; a list of them for
Mistral), or before it (DeepSeek, harmony). JSON is read by its grammar: a closing mark in a string of the arguments
does not end the call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlcore_agents.conversation.prefix import shared_length
from rlcore_agents.conversation.reply import ParsedCall, ParsedReply, call_of, call_of_json, checked_call

NAMES = ("probe_first_tool", "probe_second_tool")
ARGUMENTS = {"probe_key": "probe value"}
DECODER = json.JSONDecoder()
MARK = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class CallSyntax:
    """The text around a call.

    Attributes:
        opening: before the call; "" if a reply that is a call begins with its JSON.
        closing: after the call.
        middle: between name and arguments; None if both are in one JSON value.
        around: before the first call, outside of ``opening``.
    """

    opening: str
    closing: str
    middle: str | None = None
    around: str = ""

    def parse(self, text: str) -> ParsedReply:
        """Return the content and the calls of a reply; calls without a name are in both."""
        calls: list[ParsedCall] = []
        content: list[str] = []
        position = 0
        while (start := self._start(text, position)) >= 0:
            content.append(text[position:start])
            position, found = self._block(text, start)
            calls += found
            if not all(call.name for call in found):
                content.append(text[start:position])
        content.append(text[position:])
        if not calls:
            return ParsedReply(text)
        return ParsedReply("".join(map(self._without_marks, content)).strip("\n"), None, calls)

    def _without_marks(self, content: str) -> str:
        """Return text outside of calls: without what only encloses them."""
        content = content.removesuffix(self.around)
        return content if MARK.sub("", content).strip() else ""

    def _start(self, text: str, position: int) -> int:
        if self.opening:
            return text.find(self.opening, position)
        stripped = text.lstrip()
        is_call = not position and stripped.startswith("{") and '"name"' in stripped
        return len(text) - len(stripped) if is_call else -1

    def _block(self, text: str, start: int) -> tuple[int, list[ParsedCall]]:
        """Return where the block of calls at ``start`` ends, and its calls."""
        inside, name = start + len(self.opening), ""
        if self.middle is not None:
            found = text.find(self.middle, inside)
            if found < 0:
                problem = "the tool call is not complete; nothing was called"
                return len(text), [ParsedCall("", None, problem, text[start:])]
            name, inside = text[inside:found].strip(), found + len(self.middle)
        inside += len(text[inside:]) - len(text[inside:].lstrip())
        try:
            value, end = DECODER.raw_decode(text, inside)
        except (ValueError, RecursionError):
            closing = text.find(self.closing, inside) if self.closing else -1
            end = len(text) if closing < 0 else closing
            raw = text[inside:end]
            calls = [checked_call(name, raw, raw) if name else call_of_json(raw)]
        else:
            raw = text[inside:end]
            values = value if isinstance(value, list) and self.opening else [value]
            calls = [checked_call(name, value, raw)] if name else [call_of(each, raw) for each in values]
        after = end + len(text[end:]) - len(text[end:].lstrip())
        closed = shared_length(text[after:], self.closing)
        return (after + closed if closed else end), calls


def learned_syntax(written: Callable[[Sequence[str]], str | None], ends: Sequence[str]) -> CallSyntax | None:
    """Return how calls are written; None if the template writes none, or their arguments not as JSON.

    Args:
        written: what a template makes of a reply that calls the tools of these names with `ARGUMENTS`, from the end of
            the generation prompt; None if it cannot.
        ends: texts of tokens that may end the reply.
    """
    text = written(NAMES[:1])
    if text is None:
        return None
    combined = _json_with(text, (NAMES[0], *ARGUMENTS))
    found = combined or _json_with(text, tuple(ARGUMENTS))
    if found is None or NAMES[0] not in text[: found[1]]:
        return None
    start, end = found
    closing = min((text[end:].split(mark)[0] for mark in ends), key=len, default=text[end:]).strip()
    if combined:
        return CallSyntax(text[:start].strip(), closing)
    name = text.rindex(NAMES[0], 0, start)
    first = text[:name].lstrip()
    both = written(NAMES)
    second = both[: both.rindex(NAMES[1])] if both and NAMES[1] in both else first
    opening = first[len(first) - shared_length(first[::-1], second[::-1]) :].lstrip() or first
    return CallSyntax(opening, closing, text[name + len(NAMES[0]) : start], first.removesuffix(opening))


def _json_with(text: str, words: Sequence[str]) -> tuple[int, int] | None:
    """Return where the outermost JSON value that contains ``words`` begins and ends."""
    for start, character in enumerate(text):
        if character in "{[":
            try:
                _, end = DECODER.raw_decode(text, start)
            except ValueError:
                continue
            if all(word in text[start:end] for word in words):
                return start, end
    return None
