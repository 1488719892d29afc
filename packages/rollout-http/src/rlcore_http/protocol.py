"""`ServerProtocol`: how one kind of server is asked for completions."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rlcore.engines.rollout import GenerationRequest
from rlcore.errors import EngineError, WorkerDied
from rlcore_kit.serving.connection import Connection, Overloaded
from rlcore_kit.serving.wire_format import in_format

OVERLOAD_ATTEMPTS = 8
"""Attempts of a request that a server with too many requests refuses, over about half a minute."""
LONGEST_WAIT_S = 10.0
SEEDS = 2**63
"""Servers take seeds as signed 64-bit numbers."""


@dataclass(frozen=True)
class Piece:
    """Part of a streamed completion.

    Attributes:
        tokens: sampled ids.
        logprobs: one per token; empty if the request asked for none.
        finish_reason: the server's; None while the completion goes on.
        prompt: ids that the server read as the prompt; None if this part does not say.
        best: log-probs of the best candidates for the first token, by the server's name of the token.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None = None
    prompt: list[int] | None = None
    best: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Abilities:
    """What a server's sampling does.

    Attributes:
        scaled_logprobs: log-probs are those of the sampling temperature, not of temperature 1.
        logprobs_before_filters: log-probs are those before top-k, top-p and min-p.
        seeds: a seed gives the same tokens again.
        top_k, min_p: requests may have them.
    """

    scaled_logprobs: bool
    logprobs_before_filters: bool
    seeds: bool = True
    top_k: bool = True
    min_p: bool = True


class ServerProtocol(ABC):
    """One server's protocol; its coroutines run on the connection's thread.

    Args:
        request_fields: further fields of every request.
    """

    path: str
    """Endpoint that streams a completion."""

    def __init__(self, connection: Connection, request_fields: Mapping[str, Any]) -> None:
        self.connection, self.request_fields = connection, request_fields
        self.max_concurrent: int | None = None
        """Maximum number of requests that the server accepts at a time, if it says so."""

    @abstractmethod
    def shake_hands(self, model: str | None, folder: str, max_model_len: int) -> None:
        """Check that the server serves the policy's model in sequences of ``max_model_len`` tokens. It may block.

        Args:
            model: its name on the server; None takes the only one.
            folder: the policy's model.

        Raises:
            EngineError: it does not.
        """

    @abstractmethod
    async def body(self, request: GenerationRequest, max_tokens: int, ends: frozenset[int], best: int) -> Any:
        """Return the body of ``request``.

        Args:
            ends: ids that end the completion.
            best: number of candidates of each token whose log-probs are returned.
        """

    @abstractmethod
    def read(self, event: Any, request: GenerationRequest) -> Piece:
        """Return the part of a completion in ``event``.

        Raises:
            KeyError, TypeError, ValueError: it is not in the protocol's format.
            EngineError: it holds no token ids, or the server's refusal.
        """

    async def stream(
        self, request: GenerationRequest, max_tokens: int, ends: frozenset[int], best: int = 1
    ) -> AsyncGenerator[Piece]:
        """Yield the parts of a completion, up to the server's end of it.

        Raises:
            EngineError, WorkerError: the server refuses, fails, or ends the stream too early; see `Connection`.
        """
        what = f"complete request {request.request_id!r}"
        body = await self.body(request, max_tokens, ends, best)
        for attempt in range(OVERLOAD_ATTEMPTS):
            try:
                async with aclosing(self.connection.events(self.path, what, body=body)) as events:
                    async for event in events:
                        piece = self._piece(event, request)
                        yield piece
                        if piece.finish_reason is not None:
                            return
                raise WorkerDied(f"{self.connection.url} ended the stream of request {request.request_id!r} too early")
            except Overloaded as overloaded:
                if attempt == OVERLOAD_ATTEMPTS - 1:
                    raise EngineError(
                        f"{overloaded}; it still had after {OVERLOAD_ATTEMPTS} attempts: lower "
                        "rollout.http.max_connections, or start it with a higher limit"
                    ) from None
                await asyncio.sleep(min(overloaded.retry_after_s or 0.25 * 2**attempt, LONGEST_WAIT_S))

    def _piece(self, event: Any, request: GenerationRequest) -> Piece:
        with in_format(self.connection.url, self.path):
            piece = self.read(event, request)
            if request.sampling.logprobs and len(piece.logprobs) != len(piece.tokens):
                raise ValueError(f"{len(piece.tokens)} tokens, {len(piece.logprobs)} log-probs")
        if piece.prompt is not None and piece.prompt != list(request.prompt):
            raise EngineError(
                f"{self.connection.url} read the prompt of request {request.request_id!r} as other tokens: "
                f"{difference(piece.prompt, list(request.prompt))}; does it serve another model?"
            )
        return piece


def difference(found: list[int], expected: list[int]) -> str:
    """Describe the first difference of two lists of token ids."""
    for index, (one, other) in enumerate(zip(found, expected)):
        if one != other:
            return f"token {index} is {one} instead of {other}"
    return f"{len(found)} tokens instead of {len(expected)}"
