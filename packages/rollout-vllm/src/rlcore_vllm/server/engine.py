"""`ServerRollout`: a running ``vllm serve`` as a `RolloutEngine`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from rlcore.engines import Completion, GenerationRequest, Replicas, RolloutEngine, RolloutSpec, WeightBucket
from rlcore.engines.prompts import check_prompt
from rlcore.errors import EngineError, WorkerDied, WorkerError
from rlcore.servers.connection import Connection
from rlcore.servers.versions import Versions
from rlcore_vllm.config import VLLMSettings
from rlcore_vllm.server import completions
from rlcore_vllm.server.greeting import Greeting, greet
from rlcore_vllm.server.settings import ServerSettings
from rlcore_vllm.server.weights import ServerWeights

logger = logging.getLogger(__name__)

CONTROL_CONNECTIONS = 8
"""Connections beyond those for completions."""
INSIST_S = 0.5
"""After which time an abort is repeated for a request that was still on its way to the server."""


def build(spec: RolloutSpec) -> RolloutEngine:
    """All servers of ``spec.options.server`` behind one engine.

    Raises:
        EngineError: a server is not there, serves another model, or cannot serve training.
    """
    settings = cast(VLLMSettings, spec.options).server
    if settings is None:
        raise EngineError("mode 'server' needs the section server with the servers' URLs")
    versions = Versions()
    return Replicas(
        [partial(ServerRollout, url.rstrip("/"), spec, settings, versions) for url in settings.urls],
        names=[url.rstrip("/") for url in settings.urls],
        seed=spec.seed,
        start_together=True,
        timeout_s=settings.weights_timeout_s,
        rejoin_timeout_s=settings.rejoin_timeout_s,
    )


@dataclass(eq=False)
class _Call:
    """One request; changed on the connection's thread.

    Attributes:
        server_id: the server's name of it; empty until it is sent.
        task: works at it.
    """

    request: GenerationRequest
    server_id: str = ""
    aborted: bool = False
    task: asyncio.Task[Completion] | None = None


class ServerRollout(RolloutEngine):
    """Generates on the server at ``url``.

    HTTP runs on a thread of its own, so methods may be called from any thread and any event loop. A `WorkerError` means
    that the server is gone or broken: make another engine for it when it is back.

    Args:
        versions: shared by all clients of one run.

    Raises:
        EngineError, WorkerError: see `rlcore_vllm.server.greeting.greet`.
    """

    def __init__(self, url: str, spec: RolloutSpec, settings: ServerSettings, versions: Versions) -> None:
        self._spec, self._settings, self._versions = spec, settings, versions
        self._connection = Connection(
            url,
            api_key=settings.api_key(),
            most=settings.max_connections + CONTROL_CONNECTIONS,
            retries=settings.retries,
            timeout_s=settings.control_timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
        )
        try:
            self._greeting: Greeting = greet(self._connection, spec, settings, versions)
        except BaseException:
            self._connection.close()
            raise
        self._version = self._greeting.version
        self._weights = ServerWeights(self._connection, settings, self._greeting.workers)
        self._slots = asyncio.Semaphore(settings.max_connections)
        self._calls: set[_Call] = set()
        self._priorities = True  # until the server says that it has none
        self._paused = self._asleep = False
        self._stands_since: float | None = None  # paused, asleep, or taking weights
        self._stood_s = 0.0
        self._waking = asyncio.Lock()
        self._updates = threading.Lock()

    @property
    def version(self) -> int:
        return self._version

    @property
    def url(self) -> str:
        return self._connection.url

    # --- generating --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        check_prompt(request, self._spec.max_model_len, self._greeting.vocabulary)
        return await asyncio.wrap_future(self._connection.submit(self._generate(request)))

    async def _generate(self, request: GenerationRequest) -> Completion:
        call = _Call(request)
        call.task = asyncio.current_task()
        self._calls.add(call)
        try:
            async with self._slots:
                await self._awake()
                call.server_id = f"rlcore-{uuid.uuid4().hex}"
                answer = await self._patiently(self._ask_for(call))
            return completions.completion(request, answer, self.url, self._versions)
        except asyncio.CancelledError:
            if call.aborted and not call.server_id:
                return Completion([], [], "abort", request_id=request.request_id)
            raise
        finally:
            self._calls.discard(call)

    async def _ask_for(self, call: _Call) -> Any:
        request, what = call.request, f"complete request {call.request.request_id!r}"
        room = self._spec.max_model_len - len(request.prompt)

        async def ask() -> Any:
            body = completions.body(
                request, call.server_id, self._greeting.name, room, self._greeting.end_tokens, self._priorities
            )
            return await self._connection.request("POST", completions.PATH, what, body=body)

        try:
            return await ask()
        except EngineError as error:
            if not (self._priorities and request.priority and "priority" in str(error)):
                raise
            self._priorities = False
            logger.warning("%s ignores priorities; start it with --scheduling-policy priority", self.url)
            return await ask()

    async def _patiently(self, work: Any) -> Any:
        """The result of ``work``, which may take ``timeout_s`` while the server does not stand still."""
        task = asyncio.ensure_future(work)
        start, stood = time.monotonic(), self._standing_s()
        limit = self._settings.timeout_s
        try:
            while True:
                left = limit - (time.monotonic() - start) + (self._standing_s() - stood)
                done, _ = await asyncio.wait({task}, timeout=max(left, 0))
                if done:
                    return task.result()
                if self._stands_since is not None:
                    await asyncio.wait({task}, timeout=min(limit, 1))
                elif left <= 0:
                    raise WorkerDied(
                        f"{self.url} completed a request not within {limit:g} s: {await self._diagnosis()}"
                    )
        finally:
            task.cancel()

    async def _diagnosis(self) -> str:
        try:
            await self._connection.request(
                "GET", "/health", "say whether it is well", timeout_s=self._settings.connect_timeout_s
            )
        except (WorkerError, EngineError) as error:
            return f"it hangs ({error})"
        return "its HTTP side says that all is well, so its engine hangs, or timeout_s is too short"

    async def _awake(self) -> None:
        if not self._asleep:
            return
        async with self._waking:
            if self._asleep:
                await self._connection.request("POST", "/wake_up", "wake up", timeout_s=self._connection.timeout_s)
                await self._woken()

    async def _woken(self) -> None:
        """Waking makes the server resume, whoever had paused it."""
        if self._paused:
            await self._connection.request(
                "POST", "/pause", "pause", params=_KEEP, timeout_s=self._connection.timeout_s
            )
        self._asleep = False
        self._stand(self._paused)

    # --- control -----------------------------------------------------------------------------------------------------

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Take over the weights while the server is paused; unfinished requests are prefilled anew.

        Raises:
            WorkerError: it failed to take them. It stays paused, because it holds a mixture, until an update succeeds.
        """
        with self._updates:
            self._wait(self._awake(), "wake up")
            self._weights.begin()
            self._post("/pause", "pause", params=_KEEP)
            self._stand(True)
            self._label(self._versions.updating)
            self._weights.send(buckets, version)
            self._post("/reset_prefix_cache", "reset its prefix cache", params={"reset_running_requests": "true"})
            self._label(self._versions.label(version))
            self._version = self._attested()
            if self._version != version:
                raise WorkerError(f"{self.url} attests version {self._version} after an update to {version}")
            if not self._paused:
                self._post("/resume", "resume")
                self._stand(False)

    def _label(self, label: str) -> None:
        self._post("/update_weight_version", "label its weights", body={"new_version": label})

    def _attested(self) -> int:
        answer = self._connection.ask("GET", "/weight_info", "tell its weights' version")
        return self._versions.number(str(answer["weight_version"]))

    def pause(self) -> None:
        self._post("/pause", "pause", params=_KEEP)
        self._paused = True
        self._stand(True)

    def resume(self) -> None:
        self._paused = False
        if not self._asleep:
            self._post("/resume", "resume")
            self._stand(False)

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        self._wait(self._abort(request_ids), "abort requests")

    async def _abort(self, request_ids: Sequence[str] | None) -> None:
        calls = [call for call in self._calls if request_ids is None or call.request.request_id in request_ids]
        for call in calls:
            call.aborted = True
            if not call.server_id and call.task is not None:
                call.task.cancel()
        sent = [call for call in calls if call.server_id]
        await self._abort_sent(sent)
        if sent:
            insisting = asyncio.ensure_future(self._insist(sent))
            insisting.add_done_callback(_ignore)

    async def _abort_sent(self, calls: Sequence[_Call]) -> None:
        if calls:  # an empty list would mean everybody's requests
            names = [completions.ID_PREFIX + call.server_id for call in calls]
            await self._connection.request(
                "POST",
                "/abort_requests",
                "abort requests",
                body={"request_ids": names},
                timeout_s=self._connection.timeout_s,
            )

    async def _insist(self, calls: Sequence[_Call]) -> None:
        """Repeat an abort for requests that had not arrived at the server yet."""
        while True:
            await asyncio.sleep(INSIST_S)
            left = [call for call in calls if call in self._calls]
            if not left:
                return
            await self._abort_sent(left)

    def sleep(self) -> None:
        """Have the server give its memory back; the weights wait in its host memory. It ignores this on the CPU."""
        if not self._asleep:
            self._post("/sleep", "sleep", params={"level": "1", "mode": "keep"})
            self._asleep = True
            self._stand(True)

    def wake(self) -> None:
        self._wait(self._awake(), "wake up")

    def close(self) -> None:
        """Let the server go; it stays up, and aborts what it was still at for us."""
        self._weights.close()
        self._connection.close()

    def _post(self, path: str, what: str, *, params: dict[str, str] | None = None, body: Any = None) -> None:
        self._connection.ask("POST", path, what, params=params, body=body)

    def _wait(self, work: Any, what: str) -> None:
        limit = self._settings.control_timeout_s
        try:
            self._connection.submit(work).result(limit)
        except concurrent.futures.TimeoutError:
            raise WorkerDied(f"{self.url} did not {what} within {limit:g} s") from None

    def _stand(self, still: bool) -> None:
        """Note whether the server stands still from now on, which is no fault of its own."""
        if still and self._stands_since is None:
            self._stands_since = time.monotonic()
        elif not still and self._stands_since is not None:
            self._stood_s += time.monotonic() - self._stands_since
            self._stands_since = None

    def _standing_s(self) -> float:
        """Seconds that the server has stood still in all."""
        since = self._stands_since
        return self._stood_s + (0.0 if since is None else time.monotonic() - since)


_KEEP = {"mode": "keep"}


def _ignore(task: asyncio.Future[None]) -> None:
    """A server that dies while it is asked again has its requests to tell of it."""
    if not task.cancelled():
        task.exception()
