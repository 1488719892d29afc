"""The gateway: the protocols of OpenAI and Anthropic in front of rollout engines, an address and a key per episode."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from rlcore_agents.endpoint import Endpoint
from rlcore_agents.endpoint.endpoint import Route
from rlcore_agents.gateway import chat_completions, messages, responses
from rlcore_agents.gateway.episode_session import EpisodeSession


async def _models(session: EpisodeSession, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """Answer with the list of models, with the fields of both protocols."""
    names = (session.model, *(name for name in session.models if name != "*"))
    day = {"created": int(time.time()), "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    cards = [
        {"id": name, "object": "model", "type": "model", "display_name": name, "owned_by": "rlcore"} | day
        for name in names
    ]
    return JSONResponse(
        {"object": "list", "data": cards, "has_more": False, "first_id": names[0], "last_id": names[-1]}
    )


async def _health(session: EpisodeSession, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    return JSONResponse({})


ROUTES = (
    Route(chat_completions.PATH, chat_completions.answer, chat_completions.error),
    Route(responses.PATH, responses.answer, chat_completions.error),
    Route(messages.PATH, messages.answer, messages.error),
    Route(messages.COUNT_PATH, messages.count_tokens, messages.error),
    Route("/v1/models", _models, chat_completions.error, method="GET"),
    Route("/health", _health, chat_completions.error, method="GET"),
)


def gateway(host: str = "127.0.0.1", port: int = 0) -> Endpoint:
    """Start a gateway; its sessions are `EpisodeSession`."""
    return Endpoint(ROUTES, host, port)
