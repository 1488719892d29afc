"""Tools for chat templates that know none: described in the system message, called and answered as Hermes does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlcore_agents.conversation.call_syntax import CallSyntax
from rlcore_agents.conversation.chat_format import Tools
from rlcore_agents.conversation.reply import Message

SYNTAX = CallSyntax("<tool_call>", "</tool_call>")
INTRODUCTION = """\
You may call these functions:
{tools}

To call one, write a JSON object with its name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": "<name>", "arguments": {{"<argument>": <value>}}}}
</tool_call>"""


def tools_as_text(messages: Sequence[Message], tools: Tools, system: bool) -> list[dict[str, Any]]:
    """Return the conversation with its tools, calls and results as text of system, assistant and user messages.

    Args:
        system: the template takes system messages; without, the first user message begins with the description.
    """
    written: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") == "tool":
            result = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if written and written[-1].pop("results", None):
                written[-1]["content"] += f"\n{result}"
            else:
                written.append({"role": "user", "content": result})
            written[-1]["results"] = True
            continue
        if message.get("role") == "user" and written and written[-1].get("results"):  # roles may have to alternate
            written[-1]["content"] += f"\n\n{message.get('content') or ''}"
            continue
        calls = [_call(call) for call in message.get("tool_calls") or ()]
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        written.append(
            {**kept, "content": "\n".join(filter(None, [message.get("content"), *calls]))} if calls else kept
        )
    for message in written:
        message.pop("results", None)
    return _introduced(written, tools, system) if tools else written


def _call(call: Any) -> str:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def _introduced(messages: list[dict[str, Any]], tools: Tools, system: bool) -> list[dict[str, Any]]:
    text = INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    first = messages[0] if messages else {}
    if first.get("role") == "system" or (first.get("role") == "user" and not system):
        return [{**first, "content": "\n\n".join(filter(None, [first.get("content"), text]))}, *messages[1:]]
    return [{"role": "system" if system else "user", "content": text}, *messages]
