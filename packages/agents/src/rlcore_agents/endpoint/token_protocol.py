"""Requests and answers of vLLM's endpoint of token ids (0.32), and of its list of models.

A log-prob's entry names its token by ``token_id``, as vLLM 0.32 does, and as ``"token": "token_id:7"``, which clients
of earlier versions read (renderers 0.1.12).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

from rlcore.engines.rollout import Completion
from rlcore_agents.endpoint.session import Refusal, Session
from rlcore_agents.endpoint.settings import TokenRequest

SMALLEST_LOGPROB = -9999.0
"""What vLLM sends for a log-prob of minus infinity, which JSON does not have."""


def error(refusal: Refusal) -> Mapping[str, Any]:
    """Return the body of an error."""
    kind = "".join(word.capitalize() for word in HTTPStatus(refusal.status).phrase.split()) + "Error"
    return {
        "error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.status},
    }


def models(session: Session) -> Mapping[str, Any]:
    """Return the list of models, which has one."""
    card = {"id": session.model, "object": "model", "created": 0, "owned_by": "rlcore"}
    return {"object": "list", "data": [{**card, "root": session.model, "max_model_len": session.max_model_len}]}


def check_model(session: Session, name: object) -> None:
    """Refuse the name of a model that the session does not serve."""
    if name is not None and name != session.model:
        raise Refusal(404, f"the model {name!r} does not exist; this episode's model is {session.model!r}", "model")


async def generate(session: Session, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Answer a request for a completion.

    Raises:
        Refusal: the request is not valid, or the engine refuses it.
    """
    try:
        request = TokenRequest.model_validate(body)
    except ValidationError as error:
        raise refusal_of(error) from error
    check_model(session, request.model)
    completion = await session.generate(request.token_ids, request.sampling_params.for_engine())
    return {
        "request_id": request.request_id or completion.request_id,
        "object": "generate.completion",
        "created": int(time.time()),
        "model": session.model,
        "choices": [_choice(completion, request.sampling_params.logprobs is not None)],
        "usage": {
            "prompt_tokens": len(request.token_ids),
            "completion_tokens": len(completion.tokens),
            "total_tokens": len(request.token_ids) + len(completion.tokens),
        },
        **({"prompt_token_ids": request.token_ids} if request.return_token_ids else {}),
    }


def refusal_of(error: ValidationError) -> Refusal:
    """Return the refusal of a request whose body has a problem; the first is described."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{place}: {message}" if place else message, place or None)


def _choice(completion: Completion, logprobs: bool) -> dict[str, Any]:
    spans, start = [], 0
    for version, count in completion.versions:
        spans.append({"version": str(version), "start": start, "end": start + count})
        start += count
    entries = [
        {"token_id": token, "token": f"token_id:{token}", "logprob": max(logprob, SMALLEST_LOGPROB), "top_logprobs": []}
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=False)
    ]
    return {
        "index": 0,
        "token_ids": completion.tokens,
        "logprobs": {"content": entries} if logprobs else None,
        "finish_reason": completion.finish_reason,
        "weight_versions": spans,
    }
