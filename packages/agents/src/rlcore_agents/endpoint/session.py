"""One episode's access to a rollout engine."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
from array import array
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rlcore.engines.rollout import Completion, GenerationRequest, RolloutEngine, SamplingParams
from rlcore.errors import EngineError

POLL_S = 0.005

T = TypeVar("T")


class Refusal(Exception):
    """A request is answered with an error.

    Attributes:
        status: HTTP status; its class of error is named by each protocol.
        message: what is wrong, and what to do.
        param: the field of the request that is wrong.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


@dataclass(frozen=True)
class Call:
    """A finished request of a session: ``request`` as the engine got it, and its completion."""

    request: GenerationRequest
    completion: Completion


@dataclass(eq=False)
class Session:
    """What an address of an endpoint gives access to.

    Attributes:
        id: part of the address, and of error messages.
        url: address of the session; OpenAI's clients take ``url + "/v1"`` as base URL, Anthropic's take ``url``.
        model: name that ``/v1/models`` lists and requests give.
        max_model_len: tokens of prompt and completion.
        sampling: if given, it decides how tokens are sampled; a request may only lower ``max_tokens``, and add stop
            strings and stop tokens. None: requests decide.
        seed: source of the seeds of requests that give none. A seed depends on the prompt and on how often the session
            had it before, not on the order of requests that run at the same time. None: the engine draws one.
        calls: finished requests, in the order of their ends.
        requests: requests so far, refused ones included.
        refused: requests that were answered with an error.
        refusal: the last error.
        failure: the engine's failure, to be raised by the owner of the session: the client's program sees an answer
            with status 503.
        tasks: answers in progress.
    """

    engine: RolloutEngine
    url: str
    id: str
    model: str
    max_model_len: int
    sampling: SamplingParams | None = None
    seed: int | None = None
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    calls: list[Call] = field(default_factory=list)
    requests: int = 0
    refused: int = 0
    refusal: str = ""
    failure: BaseException | None = None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set, repr=False)
    _ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _prompts: Counter[bytes] = field(default_factory=Counter, repr=False)

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start to answer a request, in the server's event loop.

        Raises:
            Refusal: the session has ended.
        """
        with self._lock:
            if self._ended:
                work.close()
                raise Refusal(404, f"episode {self.id} has ended; requests are no longer answered")
            task = asyncio.ensure_future(work)
            self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def end(self) -> None:
        """Cancel unfinished requests and start no more; `settled` waits for their ends."""
        with self._lock:
            self._ended = True
            for task in tuple(self.tasks):
                task.get_loop().call_soon_threadsafe(task.cancel)

    async def settled(self) -> None:
        """Wait until no request is left in the engine, which may be needed for training."""
        while self.tasks:
            await asyncio.sleep(POLL_S)

    async def generate(self, prompt: Sequence[int], wanted: SamplingParams) -> Completion:
        """Sample one completion; a caller that is cancelled aborts it in the engine.

        Raises:
            Refusal: the prompt leaves no room, or the engine refuses the request or fails.
        """
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise Refusal(
                400,
                f"the prompt has {len(prompt)} tokens, which leaves no room for a completion: this model's maximum "
                f"context length is {self.max_model_len} tokens",
            )
        sampling = self._sampling(wanted, room)
        if sampling.seed is None and self.seed is not None:
            sampling = replace(sampling, seed=self._next_seed(prompt))
        request = GenerationRequest(list(prompt), sampling, f"{self.id}-{secrets.token_hex(8)}")
        try:
            completion = await self.engine.generate(request)
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.to_thread(self.engine.abort, [request.request_id]))
            raise
        except EngineError as error:
            raise Refusal(400, str(error)) from error
        except Exception as error:
            self.failure = error
            raise Refusal(503, f"the rollout engine failed: {type(error).__name__}: {error}") from error
        self.calls.append(Call(request, completion))
        return completion

    def _sampling(self, wanted: SamplingParams, room: int) -> SamplingParams:
        if self.sampling is None:
            return replace(wanted, max_tokens=min(wanted.max_tokens, room))
        return replace(
            self.sampling,
            max_tokens=min(wanted.max_tokens, self.sampling.max_tokens, room),
            stop=tuple(dict.fromkeys((*self.sampling.stop, *wanted.stop))),
            stop_token_ids=tuple(dict.fromkeys((*self.sampling.stop_token_ids, *wanted.stop_token_ids))),
            seed=None if self.seed is not None else wanted.seed,
        )

    def _next_seed(self, prompt: Sequence[int]) -> int:
        digest = hashlib.blake2b(array("q", prompt).tobytes(), digest_size=16).digest()
        number = self._prompts[digest]
        self._prompts[digest] += 1
        mixed = hashlib.blake2b(f"{self.seed}/{number}/".encode() + digest, digest_size=8).digest()
        return int.from_bytes(mixed) >> 1  # engines take 63 bits
