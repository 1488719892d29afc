"""`build`: one `ScoringEngine` over all servers, after a check of each."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import cast

from rlcore.engines.scoring import ScoringEngine, ScoringRequest, ScoringSpec, TokenScores
from rlcore.errors import EngineError, WorkerDied, WorkerError
from rlcore_http.scoring.server import ScoringServer
from rlcore_http.scoring.settings import HTTPScoringSettings
from rlcore_kit.serving.request_balance import Balance

ATTEMPTS = 3
"""Servers that may fail at one request while they run."""
FIRST_REST_S = 0.5
LONGEST_REST_S = 30.0
"""Seconds for which a server gets no requests after a failure: doubled with each failure in a row."""
POLL_S = 0.1


def build(spec: ScoringSpec) -> ScoringEngine:
    """Build one engine over the servers of ``spec.options``.

    Raises:
        EngineError: a server is unreachable, has another tokenizer or too short a context, or gives fewer likeliest
            tokens than ``spec.top_k``.
    """
    settings = cast(HTTPScoringSettings, spec.options)
    size = len(spec.tokenizer)
    if spec.top_k > size:
        raise EngineError(f"top_k is {spec.top_k}, but there are {size} tokens; lower it")
    engine = HTTPScoring(
        [ScoringServer(url.rstrip("/").removesuffix("/v1"), spec, settings) for url in settings.urls], spec, settings
    )
    try:
        engine.check()
    except BaseException:
        engine.close()
        raise
    return engine


class HTTPScoring(ScoringEngine):
    """Balances requests over ``servers`` by outstanding tokens; a request whose server fails goes to another one.

    A server that failed rests, and is checked again before its next request.
    """

    def __init__(self, servers: list[ScoringServer], spec: ScoringSpec, settings: HTTPScoringSettings) -> None:
        self._servers, self._spec, self._settings = servers, spec, settings
        self._lock = threading.Lock()
        self._balance = Balance()
        for index in range(len(servers)):
            self._balance.add(index)
        self._failures: dict[int, int] = {}
        self._reasons: dict[int, str] = {}
        self._resting: dict[int, float] = {}  # until when, by server

    def check(self) -> None:
        """Check all servers.

        Raises:
            EngineError: one does not pass, or is unreachable.
        """
        working = [server.connection.submit(server.checked()) for server in self._servers]
        for future in working:
            try:
                future.result()
            except WorkerError as error:
                raise EngineError(str(error)) from error

    @property
    def longest(self) -> int:
        """Maximum length of a sequence that every server scores, in tokens."""
        return min(server.longest for server in self._servers)

    async def score(self, request: ScoringRequest) -> TokenScores:
        """Score one request; see `ScoringEngine.score`."""
        self._check_request(request)
        failed: list[str] = []  # by servers that run
        key, trouble = object(), None
        while True:
            index = await self._assign(key, len(request.tokens), trouble)
            server = self._servers[index]
            try:
                scores = await asyncio.wrap_future(server.connection.submit(server.score(request)))
            except WorkerError as error:
                self._rest(index, str(error))
                trouble = trouble or time.monotonic()
                if not isinstance(error, WorkerDied):
                    failed.append(str(error))
                if len(failed) == ATTEMPTS:
                    raise EngineError(
                        f"request {request.request_id!r} was given up after {ATTEMPTS} failures: {'; '.join(failed)}"
                    ) from error
            else:
                self._recovered(index)
                return scores
            finally:
                with self._lock:
                    self._balance.finish(key)

    def _check_request(self, request: ScoringRequest) -> None:
        size, longest = len(self._spec.tokenizer), self._spec.max_length
        if longest is not None and len(request.tokens) > longest:
            raise EngineError(
                f"request {request.request_id!r} has {len(request.tokens)} tokens, more than the {longest} that the "
                "engine was built for"
            )
        if min(request.tokens) < 0 or max(request.tokens) >= size:  # could end the server
            raise EngineError(f"request {request.request_id!r} holds a token outside the tokenizer's {size}")
        if request.top_k > self._spec.top_k:
            raise EngineError(f"top_k is {request.top_k}, but the engine was built for {self._spec.top_k}")

    async def _assign(self, key: object, cost: int, trouble: float | None) -> int:
        """Return the server for a request, waiting for one that rests if all do.

        Args:
            trouble: time of the request's first failure; None if there is none.
        """
        limit = self._settings.rejoin_timeout_s
        trouble = time.monotonic() if trouble is None else trouble
        while True:
            with self._lock:
                now = time.monotonic()
                for index in [index for index, until in self._resting.items() if until <= now]:
                    del self._resting[index]
                    self._balance.add(index)
                reasons = "; ".join(self._reasons.values())
                if now <= trouble + limit and (chosen := self._balance.assign(key, cost)) is not None:
                    return chosen
            if now > trouble + limit:
                raise EngineError(f"no server has scored a request for {limit:g} s (rejoin_timeout_s): {reasons}")
            await asyncio.sleep(POLL_S)

    def _rest(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self._resting:
                return
            count = self._failures[index] = self._failures.get(index, 0) + 1
            rest = min(FIRST_REST_S * 2 ** (count - 1), LONGEST_REST_S)
            self._resting[index], self._reasons[index] = time.monotonic() + rest, reason
            self._balance.remove(index)

    def _recovered(self, index: int) -> None:
        with self._lock:
            self._failures.pop(index, None)
            self._reasons.pop(index, None)

    def close(self) -> None:
        """Disconnect; the servers stay up."""
        for server in self._servers:
            server.connection.close()
