"""OpenAI's ``/v1/chat/completions``."""

from __future__ import annotations

import time
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
from rlcore_agents.gateway.settings import ChatBody

PATH = "/v1/chat/completions"
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
KINDS = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}
CODES = {401: "invalid_api_key", 404: "not_found"}


def error(refusal: Refusal) -> Mapping[str, Any]:
    """Return the body of an error, in the form that all of OpenAI's endpoints share."""
    kind, code = KINDS.get(refusal.status, "invalid_request_error"), CODES.get(refusal.status)
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": code}}


async def answer(session: EpisodeSession, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """Answer a request; see `rlcore_agents.endpoint.endpoint.Route`."""
    try:
        request = ChatBody.model_validate(body)
    except ValidationError as problem:
        raise refusal_of(problem) from problem
    session.check(request)
    answers = await session.sample(_exchange(request))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
    if request.stream:
        return event_stream(_chunks(session, request, answers, head))
    choices = [
        {
            "index": index,
            "message": {"refusal": None, **one.message, "content": one.message["content"] or None},
            "finish_reason": finish_reason(one),
            "logprobs": logprobs(session, one) if request.logprobs else None,
        }
        for index, one in enumerate(answers)
    ]
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage(answers)})


def finish_reason(answer: Answer) -> str:
    """Return why a reply ended."""
    return "length" if answer.cut_off else "tool_calls" if answer.calls else "stop"


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Return the numbers of tokens."""
    prompt, sampled = answers[0].prompt_tokens, sum(len(one.completion.tokens) for one in answers)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def logprobs(session: EpisodeSession, answer: Answer) -> dict[str, Any]:
    """Return the log-probs of every sampled token, those of reasoning and tool calls included."""
    entries = token_logprobs(session, answer)
    return {"content": entries, "refusal": None}


def token_logprobs(session: EpisodeSession, answer: Answer) -> list[dict[str, Any]]:
    """Return one entry per sampled token; without entries for others than the sampled ones."""
    entries = []
    for token, logprob in zip(answer.completion.tokens, answer.completion.logprobs, strict=False):
        text = session.text_of_token(token)
        entries.append(
            {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode()), "top_logprobs": []}
        )
    return entries


def _exchange(request: ChatBody) -> Exchange:
    with reading(PATH):
        messages = [_message(message, f"messages.{index}") for index, message in enumerate(request.messages)]
        tools = []
        for index, tool in enumerate(request.offered_tools()):
            if tool.get("type", "function") != "function":
                raise Refusal(400, f"tools.{index}: only tools of type 'function' are supported", "tools")
            function = tool["function"]
            tools.append(function_tool(function["name"], function.get("description"), function.get("parameters")))
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return Exchange(
        messages,
        tools,
        request.max_completion_tokens or request.max_tokens,
        tuple(filter(None, stop)),
        request.n,
        list(request.unsupported()),
    )


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    role = message["role"]
    if role not in ROLES:
        raise Refusal(400, f"{place}.role: {role!r} is none of {', '.join(ROLES)}", place)
    if role == "tool":
        return {
            "role": "tool",
            "tool_call_id": message["tool_call_id"],
            "content": text_of(message["content"], f"{place}.content"),
        }
    kept: dict[str, Any] = {"role": ROLES[role], "content": text_of(message.get("content"), f"{place}.content")}
    if role == "assistant":
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        calls = [_call(call) for call in message.get("tool_calls") or ()]
        kept |= {"reasoning_content": reasoning} if reasoning else {}
        kept |= {"tool_calls": calls} if calls else {}
    elif message.get("name"):
        kept["name"] = message["name"]
    return kept


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = {"name": function["name"], "arguments": function["arguments"]}
    return {"id": call["id"], "type": "function", "function": arguments}


def _chunks(
    session: EpisodeSession, request: ChatBody, answers: Sequence[Answer], head: Mapping[str, Any]
) -> Iterator[Mapping[str, Any] | str]:
    counted = (request.stream_options or {}).get("include_usage")
    head = {**head, "object": "chat.completion.chunk", **({"usage": None} if counted else {})}
    for index, one in enumerate(answers):
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        for name in ("reasoning_content", "content"):
            deltas += [{name: one.message[name]}] if one.message.get(name) else []
        deltas += [{"tool_calls": [{"index": number, **call}]} for number, call in enumerate(one.calls)]
        given = logprobs(session, one) if request.logprobs else None  # with the first chunk: not split as text is
        for delta in deltas:
            choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": given}
            yield {**head, "choices": [choice]}
            given = None
        yield {
            **head,
            "choices": [{"index": index, "delta": {}, "finish_reason": finish_reason(one), "logprobs": None}],
        }
    if counted:
        yield {**head, "choices": [], "usage": usage(answers)}
    yield "[DONE]"
