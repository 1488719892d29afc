"""OpenAI's ``/v1/completions``, with prompts as token ids and the ids of sampled tokens.

OpenAI's own protocol returns text. Ids are extensions: vLLM (0.10.2) and SGLang (0.5.21) answer ``return_token_ids``,
older versions of vLLM ``return_tokens_as_token_ids``. The ids among llama.cpp's log-probs are not taken: a token that
ends inside a character is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlcore.engines.rollout import GenerationRequest
from rlcore.errors import EngineError, WorkerError
from rlcore_http.protocol import SEEDS, Piece, ServerProtocol
from rlcore_http.served_models import chosen_model
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.handshake import check_length, check_same_model

TOKEN_ID = "token_id:"
"""Prefix of a token's id in place of its text (vLLM)."""
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sent in every request, as are top-k and min-p: servers take what is not sent from the model's generation settings."""


class OpenAICompletions(ServerProtocol):
    """`ServerProtocol` of OpenAI-compatible servers."""

    path = "/v1/completions"

    def __init__(self, connection: Connection, request_fields: Mapping[str, Any]) -> None:
        super().__init__(connection, request_fields)
        self._model = ""

    def shake_hands(self, model: str | None, folder: str, max_model_len: int) -> None:
        """Choose the model; compare it with the policy's where the server's answer says enough."""
        url = self.connection.url
        answer = self.connection.ask("GET", "/v1/models", "list its models")
        card = chosen_model(url, answer, model, "rollout.http.model")
        self._model = str(card["id"])
        if card.get("max_model_len") is not None:
            remedy = f"a context of {max_model_len} tokens"
            check_length(url, int(card["max_model_len"]), max_model_len, remedy)
        check_same_model(url, str(card.get("root") or self._model), folder)

    async def body(self, request: GenerationRequest, max_tokens: int, ends: frozenset[int], best: int) -> Any:
        """Return the body of ``request``; log-probs are asked for in any case, because some servers name ids there."""
        wanted = request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(request.prompt),
            "max_tokens": max_tokens,
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "top_k": wanted.top_k or -1,
            "min_p": wanted.min_p,
            **NEUTRAL,
            "stream": True,
            "logprobs": best,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop_token_ids": sorted(ends),
            "ignore_eos": not ends,
        }
        if wanted.seed is not None:
            body["seed"] = wanted.seed % SEEDS
        return {**body, **self.request_fields}

    def read(self, event: Any, request: GenerationRequest) -> Piece:
        """Return the part of a completion in one event."""
        if error := event.get("error"):
            message = error.get("message", error) if isinstance(error, dict) else error
            raise WorkerError(f"{self.connection.url} failed to complete request {request.request_id!r}: {message}")
        if not event["choices"]:  # the count of tokens, after the end
            return Piece([], [])
        (choice,) = event["choices"]
        logprobs = choice.get("logprobs") or {}
        tokens = _token_ids(choice, logprobs)
        if tokens is None and choice.get("text"):
            raise EngineError(
                f"{self.connection.url} returns no ids of sampled tokens, and text is never tokenised again: use "
                "vLLM 0.10.2, SGLang 0.5.21 or newer versions, without a proxy that removes the fields token_ids and "
                "logprobs"
            )
        given: list[float] = []
        if tokens and request.sampling.logprobs:
            given = [float(value) for value in logprobs["token_logprobs"]]
        best = logprobs.get("top_logprobs") or [{}]
        return Piece(tokens or [], given, choice.get("finish_reason"), choice.get("prompt_token_ids"), best[0] or {})


def _token_ids(choice: Mapping[str, Any], logprobs: Mapping[str, Any]) -> list[int] | None:
    """Return the sampled ids of a choice; None if it has none."""
    if choice.get("token_ids") is not None:
        return [int(token) for token in choice["token_ids"]]
    names = logprobs.get("tokens") or ()
    if names and all(str(name).startswith(TOKEN_ID) for name in names):
        return [int(name.removeprefix(TOKEN_ID)) for name in names]
    return None
