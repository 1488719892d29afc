"""`ServerRollout`: a running ``vllm serve`` as a `RolloutEngine`."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

from rlcore.engines import Completion, GenerationRequest, RolloutEngine, RolloutSpec, WeightBucket
from rlcore.errors import EngineError, WorkerDied, WorkerError
from rlcore_kit.serving.calls import Call, Calls
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.prompts import check_prompt
from rlcore_kit.serving.replicas import Replicas
from rlcore_kit.serving.standstill import Standstill
from rlcore_kit.serving.versions import Versions
from rlcore_vllm.config import VLLMSettings
from rlcore_vllm.server import completions
from rlcore_vllm.server.greeting import Greeting, greet
from rlcore_vllm.server.settings import ServerSettings
from rlcore_vllm.server.weights import ServerWeights

logger = logging.getLogger(__name__)

CONTROL_CONNECTIONS = 8
"""Connections beyond those for completions."""


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
        self._calls = Calls(self._abort)
        self._standstill = Standstill()
        self._priorities = True  # until the server says that it has none
        self._paused = self._asleep = False
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
        with self._calls.begin(request) as call:
            try:
                async with self._slots:
                    await self._awake()
                    call.server_id = f"rlcore-{uuid.uuid4().hex}"
                    answer = await self._patiently(call)
                return completions.completion(request, answer, self.url, self._versions)
            except asyncio.CancelledError:
                if call.aborted and not call.server_id:
                    return Completion([], [], "abort", request_id=request.request_id)
                raise

    async def _ask_for(self, call: Call) -> Any:
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

    async def _patiently(self, call: Call) -> Any:
        limit = self._settings.timeout_s
        try:
            return await self._standstill.within(limit, self._ask_for(call))
        except TimeoutError:
            raise WorkerDied(
                f"{self.url} completed a request not within {limit:g} s: {await self._diagnosis()}"
            ) from None

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
        if not self._paused:
            self._standstill.end()

    # --- control -----------------------------------------------------------------------------------------------------

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Take over the weights while the server is paused; unfinished requests are prefilled anew.

        Raises:
            WorkerError: it failed to take them. It stays paused, because it holds a mixture, until an update succeeds.
        """
        with self._updates:
            self._connection.wait_for(self._awake(), "wake up")
            self._weights.begin()
            self._post("/pause", "pause", params=_KEEP)
            self._standstill.begin()
            self._label(self._versions.updating)
            self._weights.send(buckets, version)
            self._post("/reset_prefix_cache", "reset its prefix cache", params={"reset_running_requests": "true"})
            self._label(self._versions.label(version))
            self._version = self._attested()
            if self._version != version:
                raise WorkerError(f"{self.url} attests version {self._version} after an update to {version}")
            if not self._paused:
                self._post("/resume", "resume")
                self._standstill.end()

    def _label(self, label: str) -> None:
        self._post("/update_weight_version", "label its weights", body={"new_version": label})

    def _attested(self) -> int:
        answer = self._connection.ask("GET", "/weight_info", "tell its weights' version")
        return self._versions.number(str(answer["weight_version"]))

    def pause(self) -> None:
        self._post("/pause", "pause", params=_KEEP)
        self._paused = True
        self._standstill.begin()

    def resume(self) -> None:
        self._paused = False
        if not self._asleep:
            self._post("/resume", "resume")
            self._standstill.end()

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        self._connection.wait_for(self._calls.abort(request_ids), "abort requests")

    async def _abort(self, calls: Sequence[Call]) -> None:
        names = [completions.ID_PREFIX + call.server_id for call in calls]  # an empty list would mean everybody's
        await self._connection.request(
            "POST",
            "/abort_requests",
            "abort requests",
            body={"request_ids": names},
            timeout_s=self._connection.timeout_s,
        )

    def sleep(self) -> None:
        """Have the server give its memory back; the weights wait in its host memory. It ignores this on the CPU."""
        if not self._asleep:
            self._post("/sleep", "sleep", params={"level": "1", "mode": "keep"})
            self._asleep = True
            self._standstill.begin()

    def wake(self) -> None:
        self._connection.wait_for(self._awake(), "wake up")

    def close(self) -> None:
        """Let the server go; it stays up, and aborts what it was still at for us."""
        self._weights.close()
        self._connection.close()

    def _post(self, path: str, what: str, *, params: dict[str, str] | None = None, body: Any = None) -> None:
        self._connection.ask("POST", path, what, params=params, body=body)


_KEEP = {"mode": "keep"}
