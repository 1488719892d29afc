"""Anthropic's ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from rlcore_agents.endpoint import Refusal
from rlcore_agents.endpoint.token_protocol import refusal_of
from rlcore_agents.gateway.episode_session import EpisodeSession
from rlcore_agents.gateway.events import event_stream
from rlcore_agents.gateway.exchange import Answer, Exchange, function_tool, reading, text_of
from rlcore_agents.gateway.settings import CountBody, MessagesBody

PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
KINDS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
MALFORMED = "INVALID_JSON"
"""Name of the only argument of a call whose arguments are no JSON object, which the protocol cannot express."""


def error(refusal: Refusal) -> Mapping[str, Any]:
    """Return the body of an error."""
    kind = "api_error" if refusal.status >= 500 else KINDS.get(refusal.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": refusal.message}, "request_id": None}


async def answer(session: EpisodeSession, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """Answer a request; see `rlcore_agents.endpoint.endpoint.Route`."""
    try:
        request = MessagesBody.model_validate(body)
    except ValidationError as problem:
        raise refusal_of(problem) from problem
    session.check(request)
    messages, tools = _prompt(request)
    if messages[-1]["role"] == "assistant":
        raise Refusal(400, "messages: the last message must be the user's; the policy continues no given reply")
    stop = tuple(filter(None, request.stop_sequences or ()))
    exchange = Exchange(messages, tools, request.max_tokens, stop, unsupported=list(request.unsupported()))
    (one,) = await session.sample(exchange)
    message = {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": list(_blocks(one)),
        "stop_reason": _stop_reason(one),
        "stop_sequence": one.stop,
        "usage": {"input_tokens": one.prompt_tokens, "output_tokens": len(one.completion.tokens)},
    }
    return event_stream(_events(message), named=True) if request.stream else JSONResponse(message)


async def count_tokens(session: EpisodeSession, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """Answer with the number of tokens of a prompt."""
    try:
        request = CountBody.model_validate(body)
    except ValidationError as problem:
        raise refusal_of(problem) from problem
    session.check(request)
    return JSONResponse({"input_tokens": session.count_tokens(*_prompt(request))})


def _prompt(request: CountBody) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return messages and tools in the format of OpenAI's chat completions."""
    with reading(PATH):
        system = text_of(request.system, "system")
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for index, message in enumerate(request.messages):
            place = f"messages.{index}"
            match message["role"]:
                case "user":
                    messages += _user_messages(message["content"], place)
                case "assistant":
                    messages.append(_reply(message["content"], place))
                case role:
                    raise Refusal(400, f"{place}.role: {role!r} is neither 'user' nor 'assistant'", place)
        tools = [_tool(tool, f"tools.{index}") for index, tool in enumerate(request.offered_tools())]
    return messages, tools


def _user_messages(content: Any, place: str) -> Iterator[dict[str, Any]]:
    """Yield the results of tools, each as a message, and the texts between them."""
    if isinstance(content, str):
        yield {"role": "user", "content": content}
        return
    texts: list[str] = []
    for number, block in enumerate(content):
        where = f"{place}.content.{number}"
        if block["type"] != "tool_result":
            texts.append(text_of([block], where))
            continue
        if texts:
            yield {"role": "user", "content": "".join(texts)}
            texts = []
        mark = "Error: " if block.get("is_error") else ""
        result = mark + text_of(block.get("content"), where)
        yield {"role": "tool", "tool_call_id": block["tool_use_id"], "content": result}
    if texts:
        yield {"role": "user", "content": "".join(texts)}


def _reply(content: Any, place: str) -> dict[str, Any]:
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [block for block in blocks if block["type"] not in ("thinking", "tool_use")]
    reply: dict[str, Any] = {"role": "assistant", "content": text_of(texts, place)}
    thoughts = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    calls = [_call(block) for block in blocks if block["type"] == "tool_use"]
    reply |= {"reasoning_content": "".join(thoughts)} if thoughts else {}
    return reply | ({"tool_calls": calls} if calls else {})


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    given = block["input"]
    malformed = given.keys() == {MALFORMED}
    arguments = given[MALFORMED] if malformed else json.dumps(given, ensure_ascii=False)
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": arguments}}


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    kind = tool.get("type") or "custom"
    if kind != "custom":
        raise Refusal(400, f"{place}: tools of type {kind!r} are not supported, only those with an input_schema", place)
    return function_tool(tool["name"], tool.get("description"), tool["input_schema"])


def _stop_reason(one: Answer) -> str:
    if one.cut_off:
        return "max_tokens"
    return "tool_use" if one.calls else "stop_sequence" if one.stop is not None else "end_turn"


def _blocks(one: Answer) -> Iterator[dict[str, Any]]:
    if reasoning := one.message.get("reasoning_content"):
        yield {"type": "thinking", "thinking": reasoning, "signature": ""}
    if one.message["content"] or not one.calls:
        yield {"type": "text", "text": one.message["content"] or ""}
    for call in one.calls:
        function = call["function"]
        yield {"type": "tool_use", "id": call["id"], "name": function["name"], "input": _input(function["arguments"])}


def _input(arguments: str) -> dict[str, Any]:
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        given = None
    return given if isinstance(given, dict) else {MALFORMED: arguments}


def _events(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    counted = message["usage"]
    begun: dict[str, Any] = {
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**counted, "output_tokens": 0},
    }
    yield {"type": "message_start", "message": {**message, **begun}}
    blocks: Sequence[Mapping[str, Any]] = message["content"]
    for index, block in enumerate(blocks):
        empty, delta = _delta(block)
        yield {"type": "content_block_start", "index": index, "content_block": {**block, **empty}}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    ended = {name: message[name] for name in ("stop_reason", "stop_sequence")}
    yield {"type": "message_delta", "delta": ended, "usage": counted}
    yield {"type": "message_stop"}


def _delta(block: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a block that are empty at its start, and the delta that fills them."""
    match block["type"]:
        case "text":
            return {"text": ""}, {"type": "text_delta", "text": block["text"]}
        case "thinking":
            return {"thinking": ""}, {"type": "thinking_delta", "thinking": block["thinking"]}
        case _:
            partial = json.dumps(block["input"], ensure_ascii=False)
            return {"input": {}}, {"type": "input_json_delta", "partial_json": partial}
