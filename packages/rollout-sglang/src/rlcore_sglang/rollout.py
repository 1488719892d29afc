"""`SGLangServerRollout`: an SGLang server as a `RolloutEngine`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rlcore.engines.rollout import Completion, GenerationRequest
from rlcore.engines.settings import RolloutSpec
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError, WorkerDied, WorkerError
from rlcore_kit.serving.calls import Call
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.handshake import Handshake
from rlcore_kit.serving.server_rollout import ServerRollout, open_connection
from rlcore_kit.serving.weight_labels import WeightLabels
from rlcore_kit.serving.weight_stream import checked, shapes_of, with_device
from rlcore_kit.serving.wire_format import ending_tokens, joined
from rlcore_sglang import wire_format
from rlcore_sglang.adapters import Adapters
from rlcore_sglang.api import SGLangServerAPI
from rlcore_sglang.handshake import shake_hands
from rlcore_sglang.server_process import ServerProcess
from rlcore_sglang.settings import SGLangSettings
from rlcore_sglang.weights import open_delivery

WATCH_S = 2.0
"""Seconds between two looks at the server's processes while a request waits for its answer."""
HEALTH_TIMEOUT_S = 60.0
"""Timeout of a health check, which SGLang itself answers after up to 20 s."""


def connect(
    url: str,
    spec: RolloutSpec,
    settings: SGLangSettings,
    labels: WeightLabels,
    process: ServerProcess | None = None,
) -> SGLangServerRollout:
    """Connect to the server at ``url``.

    Args:
        labels: shared by all clients of one run.
        process: of the server, if it was started for this engine, which ends it when it is closed.

    Raises:
        EngineError, WorkerError: see `rlcore_sglang.handshake.shake_hands`.
    """
    api_key = settings.api_key() if process is None else process.api_key
    api = SGLangServerAPI(open_connection(url, settings, api_key), settings.pause_mode)
    try:
        handshake = shake_hands(
            api,
            spec,
            labels,
            sampling_backend=None if process is None else settings.sampling_backend,
            timeout_s=settings.weights_timeout_s,
        )
        return SGLangServerRollout(api, handshake, spec, settings, labels, process)
    except BaseException:
        api.connection.close()
        raise


class SGLangServerRollout(ServerRollout):
    """Generates on one SGLang server; see `ServerRollout` and `connect`."""

    def __init__(
        self,
        api: SGLangServerAPI,
        handshake: Handshake,
        spec: RolloutSpec,
        settings: SGLangSettings,
        labels: WeightLabels,
        process: ServerProcess | None = None,
    ) -> None:
        super().__init__(api, handshake, spec, settings, labels)
        self.process, self._settings = process, settings
        self._shapes = shapes_of(spec.model.path)
        self._delivery = open_delivery(self._connection, settings, handshake.workers)
        self._adapters: Adapters | None = None
        if settings.enable_lora:
            self._adapters = Adapters(self._connection, handshake.workers, self._shapes, settings.weights_timeout_s)
            self._adapters.continue_with(labels.label(handshake.version) if handshake.version > 0 else None)
        self._router: Connection | None = None
        self._behind_router: list[SGLangServerAPI] = []  # the router may have sent a request to any of them
        if settings.router is not None:
            others = [url for url in settings.urls if url.rstrip("/") != self.url]
            self._router, *connections = (
                open_connection(url, settings, settings.api_key()) for url in (settings.router, *others)
            )
            self._behind_router = [SGLangServerAPI(connection, settings.pause_mode) for connection in connections]
            self._requests_url = self._router.url
        self._interrupted = set[Call]()  # by a pause that aborts; they continue afterwards
        self._last_sign_of_life = time.monotonic()
        self._health_lock = asyncio.Lock()
        self._check_every_s = min(settings.health_interval_s, WATCH_S)

    @property
    def takes_adapters(self) -> bool:
        """True if updates bring LoRA adapters."""
        return self._adapters is not None

    # --- generation --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        """Generate one completion; see `RolloutEngine.generate`."""
        if request.sampling.min_p and not self._handshake.min_p:
            raise EngineError(
                f"{self.url} runs deterministic inference, under which SGLang ends at a request with min_p; start it "
                "with --sampling-backend rlcore instead"
            )
        try:
            return await super().generate(request)
        except WorkerDied as error:
            raise error if self.process is None else await asyncio.to_thread(self.process.explain, error) from error

    async def _complete(self, call: Call) -> Completion:
        """Generate in as many parts as pauses, and ends that SGLang sees and the request does not, make necessary."""
        request = call.request
        ends = ending_tokens(request, self._handshake.end_tokens)
        try:
            while True:
                answer = await self._part(call, wire_format.remaining(request, call.completion), ends)
                part = wire_format.completion(request, answer, self.url, self._labels)
                call.completion = joined(call.completion, part)
                interrupted = part.finish_reason == "abort" and call in self._interrupted and not call.aborted
                if not interrupted and not wire_format.ended_too_early(answer, ends):
                    return call.completion
                if self._tokens_left(call) == 0:
                    end = Completion([], [], "length", request_id=request.request_id)
                    return joined(call.completion, end)
                self._interrupted.discard(call)
        finally:
            self._interrupted.discard(call)

    def _tokens_left(self, call: Call) -> int:
        request = call.request
        maximum = min(request.sampling.max_tokens, self._spec.max_model_len - len(request.prompt))
        return maximum - len(call.completion.tokens)

    async def _part(self, call: Call, request: GenerationRequest, ends: frozenset[int]) -> Any:
        """Return the server's answer to ``request``, the rest of ``call``."""
        await self._admit(call)
        adapter = self._adapters.name if self._adapters is not None else None
        longest = self._spec.max_model_len - len(request.prompt)
        body = wire_format.body(request, call.server_id, longest, ends, adapter)
        try:
            answer = await self._with_timeout(call, self._post(body, f"complete request {request.request_id!r}"))
        finally:
            call.server_id = ""
        self._last_sign_of_life = time.monotonic()
        return answer

    async def _post(self, body: dict[str, Any], what: str) -> Any:
        connection = self._router or self._connection
        posting = connection.request("POST", wire_format.PATH, what, body=body)
        if connection is self._connection:
            return await posting
        return await asyncio.wrap_future(connection.submit(posting))

    async def _check_health(self) -> None:
        """Raise `WorkerDied` if a process of the server ended, or if the server hangs.

        A server that sent nothing for ``health_interval_s`` is asked for its health.
        """
        process = self.process
        if process is not None and (failure := await asyncio.to_thread(lambda: process.failure)) is not None:
            raise WorkerDied(failure)
        async with self._health_lock:
            if time.monotonic() - self._last_sign_of_life < self._settings.health_interval_s:
                return
            paused_before = self._pause_clock.seconds()
            try:
                await self.api.check_health(HEALTH_TIMEOUT_S)
            except (WorkerError, EngineError) as error:
                if self._pause_clock.seconds() == paused_before:
                    raise WorkerDied(f"{self.url} hangs: {error}") from error
            self._last_sign_of_life = time.monotonic()

    async def _abort_on_server(self, calls: Sequence[Call]) -> None:
        ids = [call.server_id for call in calls]
        others = [asyncio.wrap_future(api.connection.submit(api.abort(ids))) for api in self._behind_router]
        await asyncio.gather(self.api.abort(ids), *others)

    # --- weights and pauses ------------------------------------------------------------------------------------------

    def _prepare_update(self, buckets: Iterable[WeightBucket]) -> Iterable[WeightBucket]:
        if self._adapters is not None:
            return buckets
        device, stream = with_device(checked(buckets, self._shapes))
        self._delivery.prepare(device)
        return stream

    def _send_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        if self._adapters is not None:
            self._adapters.send(buckets, self._labels.label(version))
        else:
            self._delivery.send(buckets)

    async def _pause_server(self) -> None:
        if self._settings.pause_mode == "abort":
            self._interrupted |= {call for call in self._calls if call.server_id}
        await super()._pause_server()

    async def _resume_server(self) -> None:
        await super()._resume_server()
        self._last_sign_of_life = time.monotonic()

    def sleep(self) -> None:
        """Have the server release its memory, and drop its weights if ``sleep_level`` is 2; the CPU keeps both."""
        if not self._asleep:
            super().sleep()
            self._weights_dropped = self._settings.sleep_level == 2

    def close(self) -> None:
        """Disconnect, and end the server if it was started for this engine."""
        self._delivery.close()
        for api in self._behind_router:
            api.connection.close()
        if self._router is not None:
            self._router.close()
        super().close()
        if self.process is not None:
            self.process.stop()
