"""Short completions at the start, which show what a server's sampling does; its documentation need not be believed.

Fields that a server does not know are ignored silently, and the meaning of log-probs depends on how it was started.
"""

from __future__ import annotations

import asyncio
import logging

from rlcore.engines.rollout import GenerationRequest, SamplingParams
from rlcore.errors import EngineError
from rlcore_http.protocol import Abilities, ServerProtocol

logger = logging.getLogger(__name__)

LENGTH = 8
BEST = 2
TOLERANCE = 1e-3
"""Difference of two log-probs of the same meaning, from sums in another order."""
Sample = tuple[list[int], list[float], dict[str, float]]
"""Tokens, their log-probs, and log-probs of the best candidates for the first."""


async def probe(protocol: ServerProtocol, prompt: list[int]) -> Abilities:
    """Return what the sampling of the server does, from completions of ``prompt``.

    Raises:
        EngineError, WorkerError: it returns no token ids, or no completions.
    """
    plain, again, hot, greedy, best, likely = await asyncio.gather(
        _sample(protocol, prompt, seed=1),
        _sample(protocol, prompt, seed=1),
        _sample(protocol, prompt, seed=1, temperature=2.0),
        _sample(protocol, prompt, temperature=0.0),
        _sample(protocol, prompt, seed=1, temperature=2.0, top_k=1),
        _sample(protocol, prompt, seed=1, temperature=2.0, min_p=1.0),
    )
    abilities = Abilities(
        scaled_logprobs=not _same(plain[2], hot[2]),
        logprobs_before_filters=abs(best[1][0] - max(hot[2].values(), default=0.0)) <= TOLERANCE,
        seeds=plain[0] == again[0],
        top_k=best[0] == greedy[0],
        min_p=likely[0] == greedy[0],
    )
    if not abilities.seeds:
        logger.warning("%s ignores seeds: completions are not reproducible", protocol.connection.url)
    return abilities


async def _sample(protocol: ServerProtocol, prompt: list[int], **sampling: float) -> Sample:
    wanted = SamplingParams(max_tokens=LENGTH, **sampling)  # type: ignore[arg-type]
    request = GenerationRequest(prompt, wanted, request_id="probe")
    tokens: list[int] = []
    logprobs: list[float] = []
    best: dict[str, float] = {}
    async for piece in protocol.stream(request, LENGTH, frozenset(), BEST):
        tokens += piece.tokens
        logprobs += piece.logprobs
        best = best or dict(piece.best)
    if not tokens:
        raise EngineError(f"{protocol.connection.url} answers with completions without tokens")
    return tokens, logprobs, best


def _same(first: dict[str, float], second: dict[str, float]) -> bool:
    """Return whether candidates have the same log-probs in both; those of two temperatures differ."""
    common = first.keys() & second.keys()
    return bool(common) and all(abs(first[name] - second[name]) <= TOLERANCE for name in common)
