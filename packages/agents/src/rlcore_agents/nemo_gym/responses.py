"""Between NeMo Gym's rows and responses, which are those of OpenAI's Responses API, and conversations."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlcore_agents.gateway.responses import messages_of

Message = Mapping[str, Any]


def conversation(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages that ``responses_create_params`` begin with.

    Raises:
        Exception: they are not in the format, or have parts that are not text.
    """
    given = params["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    instructions = [{"role": "system", "content": params["instructions"]}] if params.get("instructions") else []
    return [*instructions, *messages_of(items)]


def function_tools(params: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the functions among the tools of ``responses_create_params``."""
    return [tool for tool in params.get("tools") or () if tool.get("type") == "function"]


def response(messages: Sequence[Message], params: Mapping[str, Any], complete: bool) -> dict[str, Any]:
    """Return the Response that a verifier reads.

    Args:
        messages: replies of the policy, and results of tools.
        complete: False if a limit ended the episode.
    """
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": time.time(),
        "model": str(params.get("model") or "policy"),
        "output": [item for message in messages for item in _items(message)],
        "status": "completed" if complete else "incomplete",
        "incomplete_details": None if complete else {"reason": "max_output_tokens"},
        "parallel_tool_calls": params.get("parallel_tool_calls", True),
        "tool_choice": params.get("tool_choice", "auto"),
        "tools": params.get("tools") or [],
    }


def _items(message: Message) -> Iterator[dict[str, Any]]:
    if message["role"] == "tool":
        yield {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
        return
    if reasoning := message.get("reasoning_content"):
        summary = [{"type": "summary_text", "text": reasoning}]
        yield {"type": "reasoning", "id": f"rs_{uuid.uuid4().hex}", "summary": summary}
    calls = message.get("tool_calls") or ()
    if message["content"] or not calls:
        text = {"type": "output_text", "text": message["content"], "annotations": []}
        reply = {"role": "assistant", "status": "completed", "content": [text]}
        yield {"type": "message", "id": f"msg_{uuid.uuid4().hex}", **reply}
    for call in calls:
        yield {"type": "function_call", "call_id": call["id"], **call["function"]}
