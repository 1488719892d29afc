"""OpenAI's ``/v1/responses``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from rlcore_agents.endpoint import Refusal
from rlcore_agents.endpoint.token_protocol import refusal_of
from rlcore_agents.gateway.chat_completions import ROLES, token_logprobs
from rlcore_agents.gateway.episode_session import EpisodeSession
from rlcore_agents.gateway.events import event_stream
from rlcore_agents.gateway.exchange import Answer, Exchange, function_tool, reading, text_of
from rlcore_agents.gateway.settings import ResponsesBody

PATH = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"


async def answer(session: EpisodeSession, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """Answer a request; see `rlcore_agents.endpoint.endpoint.Route`."""
    try:
        request = ResponsesBody.model_validate(body)
    except ValidationError as problem:
        raise refusal_of(problem) from problem
    session.check(request)
    conversation = _conversation(session, request)
    with reading(PATH):
        tools = [_tool(tool, f"tools.{index}") for index, tool in enumerate(request.offered_tools())]
    instructions = [{"role": "system", "content": request.instructions}] if request.instructions else []
    exchange = Exchange(
        [*instructions, *conversation], tools, request.max_output_tokens, unsupported=list(request.unsupported())
    )
    (one,) = await session.sample(exchange)
    response = _response(session, request, one)
    session.responses[response["id"]] = [*conversation, one.message]
    return event_stream(_events(response), named=True) if request.stream else JSONResponse(response)


def _conversation(session: EpisodeSession, request: ResponsesBody) -> list[Mapping[str, Any]]:
    """Return the messages of the previous response and of the input.

    Raises:
        Refusal: there is no such response, or an item is not supported.
    """
    earlier: Sequence[Mapping[str, Any]] = ()
    if request.previous_response_id is not None:
        if request.previous_response_id not in session.responses:
            where = "previous_response_id"
            raise Refusal(404, f"there is no response {request.previous_response_id!r} in this episode", where)
        earlier = session.responses[request.previous_response_id]
    items = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    if not items and not earlier:
        raise Refusal(400, "input: there is no message to reply to", "input")
    return [*earlier, *messages_of(items)]


def messages_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation that the items of an input are.

    Raises:
        Refusal: an item is not supported, or has another form.
    """
    messages: list[dict[str, Any]] = []
    with reading(PATH):
        for index, item in enumerate(items):
            _add_item(messages, item, f"input.{index}")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    """Add an item to the conversation; reasoning, text and calls of one reply are items of one message."""
    match item.get("type", "message"):
        case "message":
            role = ROLES[item["role"]]
            content = text_of(item["content"], f"{place}.content")
            if role == "assistant":
                _reply(messages, "tool_calls", "content")["content"] = content
            else:
                messages.append({"role": role, "content": content})
        case "reasoning":
            texts = [part["text"] for part in item.get("content") or item.get("summary") or ()]
            if texts:
                _reply(messages, "tool_calls", "content", "reasoning_content")["reasoning_content"] = "".join(texts)
        case "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            _reply(messages).setdefault("tool_calls", []).append(call)
        case "function_call_output":
            content = text_of(item["output"], f"{place}.output")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        case kind:
            raise Refusal(400, f"{place}: items of type {kind!r} are not supported", place)


def _reply(messages: list[dict[str, Any]], *complete: str) -> dict[str, Any]:
    """Return the reply that the next item belongs to: the last message, unless it has one of ``complete`` already."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or any(last.get(name) for name in complete):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    if tool["type"] != "function":
        raise Refusal(400, f"{place}: tools of type {tool['type']!r} are not supported, only functions", "tools")
    return function_tool(tool["name"], tool.get("description"), tool.get("parameters"))


def _response(session: EpisodeSession, request: ResponsesBody, one: Answer) -> dict[str, Any]:
    sampled = len(one.completion.tokens)
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if one.cut_off else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if one.cut_off else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": (request.model_extra or {}).get("metadata") or {},
        "model": request.model,
        "output": list(_output(session, request, one)),
        "parallel_tool_calls": True,
        "previous_response_id": request.previous_response_id,
        "temperature": session.sampling.temperature,
        "top_p": session.sampling.top_p,
        "text": {"format": {"type": "text"}},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "usage": {
            "input_tokens": one.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": sampled,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": one.prompt_tokens + sampled,
        },
    }


def _output(session: EpisodeSession, request: ResponsesBody, one: Answer) -> Iterator[dict[str, Any]]:
    status = "incomplete" if one.cut_off else "completed"
    if reasoning := one.message.get("reasoning_content"):
        content = [{"type": "reasoning_text", "text": reasoning}]
        yield {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": [], "content": content, "status": status}
    if one.message["content"] or not one.calls:
        logprobs = token_logprobs(session, one) if LOGPROBS in (request.include or ()) else []
        text = {"type": "output_text", "text": one.message["content"] or "", "annotations": [], "logprobs": logprobs}
        message = {"type": "message", "role": "assistant", "content": [text], "status": status}
        yield {"id": f"msg_{uuid.uuid4().hex}", **message}
    for call in one.calls:
        function = {"type": "function_call", "call_id": call["id"], **call["function"], "status": status}
        yield {"id": f"fc_{uuid.uuid4().hex}", **function}


def _events(response: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    begun = {**response, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
    ]
    for index, item in enumerate(response["output"]):
        events += ({**event, "output_index": index} for event in _item_events(item))
    events.append({"type": f"response.{response['status']}", "response": response})
    for number, event in enumerate(events):
        yield {**event, "sequence_number": number}


def _item_events(item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of one item of the output."""
    place = {"item_id": item["id"]}
    empty: dict[str, Any] = {"arguments": ""} if item["type"] == "function_call" else {"content": []}
    yield {"type": "response.output_item.added", "item": {**item, **empty, "status": "in_progress"}}
    if item["type"] == "function_call":
        arguments = item["arguments"]
        yield {"type": "response.function_call_arguments.delta", **place, "delta": arguments}
        done = {"type": "response.function_call_arguments.done", **place, "name": item["name"]}
        yield {**done, "arguments": arguments}
    else:
        (part,) = item["content"]
        place["content_index"] = 0
        scores = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
        kind = "response.output_text" if item["type"] == "message" else "response.reasoning_text"
        yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
        yield {"type": f"{kind}.delta", **place, "delta": part["text"], **scores}
        yield {"type": f"{kind}.done", **place, "text": part["text"], **scores}
        yield {"type": "response.content_part.done", **place, "part": part}
    yield {"type": "response.output_item.done", "item": item}
