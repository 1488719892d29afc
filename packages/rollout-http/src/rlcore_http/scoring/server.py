"""`ScoringServer`: one server that scores, with the checks that it must pass before its first request."""

from __future__ import annotations

import asyncio
from typing import Any

from rlcore.engines.scoring import ScoringRequest, ScoringSpec, TokenScores
from rlcore.errors import EngineError, WorkerDied
from rlcore_http.protocol import LONGEST_WAIT_S, OVERLOAD_ATTEMPTS
from rlcore_http.scoring.protocols import ScoringProtocol, choose_protocol
from rlcore_http.scoring.settings import HTTPScoringSettings
from rlcore_kit.serving.connection import Connection, Overloaded
from rlcore_kit.serving.handshake import check_length
from rlcore_kit.serving.server_rollout import open_connection
from rlcore_kit.serving.wire_format import in_format

PROBED = 16
"""Tokens of the first request."""
TOLERANCE = 1e-3
COMPARED = 4096
"""Tokens whose texts are compared at a time."""


class ScoringServer:
    """One server. Its coroutines run on the connection's thread.

    Attributes:
        longest: longest sequence that it scores, in tokens; 0 before its checks.
    """

    def __init__(self, url: str, spec: ScoringSpec, settings: HTTPScoringSettings) -> None:
        self.spec, self._settings = spec, settings
        self.connection: Connection = open_connection(url, settings, settings.api_key(), settings.headers)
        self._slots = asyncio.Semaphore(settings.max_connections)
        self._checking = asyncio.Lock()
        self._protocol: ScoringProtocol | None = None
        self.longest = 0

    @property
    def url(self) -> str:
        """Base URL of the server."""
        return self.connection.url

    async def score(self, request: ScoringRequest) -> TokenScores:
        """Score a request, after the checks if the server has not passed them.

        Raises:
            WorkerError: the server is gone or broken; it is checked again before its next request.
            EngineError: it refuses the request, or does not pass a check.
        """
        try:
            async with self._slots:
                return await self._ask(await self.checked(), request)
        except WorkerDied:
            self._protocol = None  # what runs under its address next may be another server
            raise

    async def checked(self) -> ScoringProtocol:
        """Return the server's protocol, after the checks if it has not passed them.

        Raises:
            WorkerError, EngineError: see `score`.
        """
        async with self._checking:
            if self._protocol is None:
                protocol = await choose_protocol(self.connection, self._settings)
                await self._check(protocol)
                self._protocol = protocol
            return self._protocol

    async def _check(self, protocol: ScoringProtocol) -> None:
        with in_format(self.url, "its description"):
            self.longest = await protocol.longest()
        if (needed := self.spec.max_length) is not None:
            check_length(self.url, self.longest, needed, protocol.longer(needed))
        await self._check_tokens()
        size = len(self.spec.tokenizer)
        probe = ScoringRequest([token % size for token in range(1, PROBED)], top_k=self.spec.top_k, request_id="probe")
        try:
            scores = await self._ask(protocol, probe)
        except EngineError as error:
            if not self.spec.top_k or "(401" in str(error):
                raise
            top_k = self.spec.top_k
            raise EngineError(
                f"{self.url} does not give the {top_k} likeliest tokens; {protocol.more(top_k)}, or lower top_k "
                f"({error})"
            ) from error
        mass = scores.top_logprobs.exp().sum(-1)
        if scores.logprobs.max() > TOLERANCE or bool((mass > 1 + TOLERANCE).any()):
            raise EngineError(
                f"{self.url} returns numbers that are no log-probs (vLLM with --logprobs-mode raw_logits?); start it "
                "with its default, raw_logprobs"
            )

    async def _ask(self, protocol: ScoringProtocol, request: ScoringRequest) -> TokenScores:
        what = f"score request {request.request_id!r}"
        for attempt in range(OVERLOAD_ATTEMPTS):
            try:
                answer = await self.connection.request(
                    "POST", protocol.path, what, body=protocol.body(request), timeout_s=self._settings.timeout_s
                )
                with in_format(self.url, protocol.path):
                    scores = protocol.read(answer, request)
                self._check_candidates(scores)
                return scores
            except Overloaded as overloaded:
                if attempt == OVERLOAD_ATTEMPTS - 1:
                    raise EngineError(
                        f"{overloaded}; it still had after {OVERLOAD_ATTEMPTS} attempts: lower max_connections"
                    ) from None
                await asyncio.sleep(min(overloaded.retry_after_s or 0.25 * 2**attempt, LONGEST_WAIT_S))
        raise AssertionError("unreachable")

    def _check_candidates(self, scores: TokenScores) -> None:
        size, largest = len(self.spec.tokenizer), int(scores.top_ids.max()) if scores.top_ids.numel() else 0
        if largest >= size:
            raise EngineError(
                f"{self.url} names {largest} as one of the likeliest tokens, which none of the tokenizer's {size} is: "
                "its model's vocabulary is padded; lower top_k"
            )

    # --- its tokens --------------------------------------------------------------------------------------------------

    async def _check_tokens(self) -> None:
        """Compare the text of every token with the server's.

        Raises:
            EngineError: a token differs; the message names it.
        """
        size = len(self.spec.tokenizer)
        for start in range(0, size, COMPARED):
            tokens = range(start, min(start + COMPARED, size))
            async for token, here, there in self._differences(tokens):
                raise EngineError(
                    f"{self.url} has another tokenizer: token {token} is {there!r} there and {here!r} here; serve a "
                    "model with this tokenizer"
                )

    async def _differences(self, tokens: range) -> Any:
        """Yield the tokens of a range whose texts differ, with both texts, by comparing halves of it."""
        here, there = self._text(tokens), await self._text_there(tokens)
        if here == there:
            return
        if len(tokens) == 1:
            yield tokens[0], here, there
            return
        middle = len(tokens) // 2
        for half in (tokens[:middle], tokens[middle:]):
            async for found in self._differences(half):
                yield found

    def _text(self, tokens: range) -> str:
        text: str = self.spec.tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    async def _text_there(self, tokens: range) -> str:
        body = {"tokens": list(tokens), "skip_special_tokens": False}
        answer = await self.connection.request(
            "POST", "/detokenize", "decode tokens", body=body, timeout_s=self.connection.timeout_s
        )
        with in_format(self.url, "/detokenize"):
            return str(answer["prompt"] if "prompt" in answer else answer["text"])
