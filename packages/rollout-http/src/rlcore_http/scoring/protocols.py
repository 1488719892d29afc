"""How vLLM and SGLang are asked for the log-probs of given tokens, and what they answer.

Both name tokens by ids in the answer, and every log-prob is taken by the id of its token, never by its place in a list
of candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from rlcore.engines.scoring import ScoringRequest, TokenScores
from rlcore.errors import EngineError
from rlcore_http import quirks
from rlcore_http.scoring.settings import HTTPScoringSettings
from rlcore_http.served_models import chosen_model
from rlcore_kit.serving.connection import Connection

Candidates = list[tuple[int, float]]
"""Ids and log-probs of one position."""


class ScoringProtocol(ABC):
    """One server's protocol; its coroutines run on the connection's thread."""

    path: str
    """Endpoint that scores."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @abstractmethod
    async def longest(self) -> int:
        """Return the longest sequence that the server scores, in tokens.

        Raises:
            EngineError: the server does not serve the model that is asked for.
            KeyError, TypeError, ValueError: its answer is not in its format.
        """

    @abstractmethod
    def longer(self, length: int) -> str:
        """Return the options with which the server scores sequences of ``length`` tokens, for messages."""

    @abstractmethod
    def more(self, top_k: int) -> str:
        """Return how the server gives ``top_k`` likeliest tokens, for messages."""

    @abstractmethod
    def body(self, request: ScoringRequest) -> dict[str, Any]:
        """Return the body of ``request``."""

    @abstractmethod
    def read(self, answer: Any, request: ScoringRequest) -> TokenScores:
        """Return the scores in an answer.

        Raises:
            KeyError, IndexError, TypeError, ValueError: it is not in the protocol's format, or is about other tokens.
        """


class VLLM(ScoringProtocol):
    """``/v1/completions`` of vLLM, which must also sample one token.

    Args:
        model: its name; None takes the only one.
    """

    path = "/v1/completions"

    def __init__(self, connection: Connection, model: str | None) -> None:
        super().__init__(connection)
        self._wanted, self._model = model, ""

    async def longest(self) -> int:
        answer = await self.connection.request(
            "GET", "/v1/models", "list its models", timeout_s=self.connection.timeout_s
        )
        card = chosen_model(self.connection.url, answer, self._wanted, "model")
        self._model = str(card["id"])
        return int(card["max_model_len"]) - 1

    def longer(self, length: int) -> str:
        return f"--max-model-len {length + 1}"

    def more(self, top_k: int) -> str:
        return f"start it with --max-logprobs {top_k}"

    def body(self, request: ScoringRequest) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": list(request.tokens),
            "max_tokens": 1,
            "prompt_logprobs": request.top_k,
        }

    def read(self, answer: Any, request: ScoringRequest) -> TokenScores:
        (choice,) = answer["choices"]
        found = choice["prompt_logprobs"]
        if found is None or len(found) != len(request.tokens):
            raise ValueError(f"prompt_logprobs of {0 if found is None else len(found)} tokens")
        rows = [{int(id): float(entry["logprob"]) for id, entry in row.items()} for row in found[request.start :]]
        logprobs = [row[token] for row, token in zip(rows, request.tokens[request.start :], strict=True)]
        return _scores(logprobs, [list(row.items()) for row in rows], request.top_k)


class SGLang(ScoringProtocol):
    """``/generate`` of SGLang, without any new token."""

    path = "/generate"

    async def longest(self) -> int:
        answer = await self.connection.request(
            "GET", "/server_info", "report its settings", timeout_s=self.connection.timeout_s
        )
        return int(answer["max_req_input_len"]) - 1

    def longer(self, length: int) -> str:
        return f"--context-length {length + 8} and a KV cache of that size (--max-total-tokens, --mem-fraction-static)"

    def more(self, top_k: int) -> str:
        return "is it SGLang 0.5.21 or newer?"

    def body(self, request: ScoringRequest) -> dict[str, Any]:
        return {
            "input_ids": list(request.tokens),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": request.start - 1,  # whose own entry is null
            "top_logprobs_num": request.top_k,
        }

    def read(self, answer: Any, request: ScoringRequest) -> TokenScores:
        info, scored = answer["meta_info"], list(request.tokens[request.start :])
        given = info["input_token_logprobs"][1:]  # shift allowed: without the null entry of the token before
        names = [int(entry[1]) for entry in given]
        if len(names) != len(scored) or not all(
            quirks.named_by_sglang(name, token) for name, token in zip(names, scored)
        ):
            raise ValueError(f"{len(names)} log-probs of other tokens than the {len(scored)} that were sent")
        best: list[Candidates] = [[] for _ in scored]
        if request.top_k and scored:
            rows = info["input_top_logprobs"][1:]  # shift allowed: as above
            best = [[(int(entry[1]), float(entry[0])) for entry in row] for row in rows]
        return _scores([float(entry[0]) for entry in given], best, request.top_k)


def _scores(logprobs: Sequence[float], best: Sequence[Candidates], top_k: int) -> TokenScores:
    """Return scores with the ``top_k`` likeliest candidates of each position."""
    rows = [sorted(row, key=lambda entry: -entry[1])[:top_k] for row in best]
    if len(rows) != len(logprobs) or any(len(row) != top_k for row in rows):
        raise ValueError(f"fewer than {top_k} candidates for a token")
    shape = (len(rows), top_k)
    return TokenScores(
        torch.tensor(logprobs, dtype=torch.float32),
        torch.tensor([[id for id, _ in row] for row in rows], dtype=torch.int64).reshape(shape),
        torch.tensor([[logprob for _, logprob in row] for row in rows], dtype=torch.float32).reshape(shape),
    )


async def choose_protocol(connection: Connection, settings: HTTPScoringSettings) -> ScoringProtocol:
    """Return the protocol that ``settings`` name, or that the server speaks.

    Raises:
        EngineError: the server speaks neither.
        WorkerError: it is unreachable.
    """
    name = settings.protocol
    if name == "auto":
        name = "sglang" if await _has(connection, "/server_info", "max_req_input_len") else "vllm"
        if name == "vllm" and not await _has(connection, "/version", "version"):
            raise EngineError(
                f"{connection.url} is neither vLLM (/version) nor SGLang (/server_info): it cannot score given tokens"
            )
    return SGLang(connection) if name == "sglang" else VLLM(connection, settings.model)


async def _has(connection: Connection, path: str, key: str) -> bool:
    """Return whether the server's answer at ``path`` has ``key``."""
    try:
        answer = await connection.request("GET", path, "describe itself", timeout_s=connection.timeout_s)
    except EngineError as error:
        if "(401" in str(error):
            raise
        return False
    return isinstance(answer, dict) and key in answer
