"""`ScoringEngine`: log-probs of given tokens, such as a teacher's; it generates nothing."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlcore import event_loop
from rlcore.progress import report

if TYPE_CHECKING:
    import torch

    from rlcore.config import Config

SCORING_ENGINE_INTERFACE = 1


@dataclass(frozen=True)
class ScoringSpec:
    """Everything a plugin needs to build one `ScoringEngine`.

    Attributes:
        options: the backend's own section, already validated.
        tokenizer: whose ids requests hold (of transformers); the engine makes sure that its model reads them as this
            tokenizer does.
        max_length: longest sequence that is scored, in tokens; None if unknown.
        top_k: largest number of likeliest tokens that a request asks for.
    """

    options: Config
    tokenizer: Any
    max_length: int | None
    top_k: int = 0


@dataclass(frozen=True)
class ScoringRequest:
    """A sequence whose last tokens are scored.

    Attributes:
        tokens: token ids of the whole sequence.
        start: index of the first token that is scored, from 1 on: the first token of a sequence has no log-prob.
        top_k: number of likeliest tokens that are returned at every scored position; 0 returns none.
    """

    tokens: Sequence[int]
    start: int = 1
    top_k: int = 0
    request_id: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.start <= len(self.tokens):
            raise ValueError(f"start must be in 1 … {len(self.tokens)}, not {self.start}")


@dataclass(frozen=True)
class TokenScores:
    """Log-probs at temperature 1 over the whole vocabulary; entry t is that of ``tokens[start + t]``.

    Attributes:
        logprobs: of the given tokens, ``[T]`` fp32.
        top_ids: the likeliest tokens in falling order, ``[T, k]`` int64; k is 0 if none were asked for.
        top_logprobs: theirs, ``[T, k]`` fp32.
    """

    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


class ScoringEngine(ABC):
    """Scores tokens under weights that do not change.

    `score` is awaited in event loops of several threads at the same time.
    """

    @property
    @abstractmethod
    def longest(self) -> int:
        """Maximum length of a sequence, in tokens."""

    @abstractmethod
    async def score(self, request: ScoringRequest) -> TokenScores:
        """Score the tokens of one request. Any number of calls may be outstanding; the engine bounds its load.

        Raises:
            EngineError: the request is impossible (too long, a token that the model does not have), or nothing that
                serves the model is left.
        """

    def score_batch(self, requests: Sequence[ScoringRequest]) -> list[TokenScores]:
        """Score all requests and return the results in their order."""

        done = 0

        async def one(request: ScoringRequest) -> TokenScores:
            nonlocal done
            scores = await self.score(request)
            done += 1
            report("sequences scored", done, len(requests))
            return scores

        async def gather() -> list[TokenScores]:
            return await asyncio.gather(*map(one, requests))

        return event_loop.run(gather())

    def close(self) -> None:
        """Release resources; the engine is not used afterwards."""
        return
