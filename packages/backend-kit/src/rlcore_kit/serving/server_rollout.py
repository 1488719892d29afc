"""`ServerRollout`: the part of a rollout engine over an inference server that all kinds of servers share."""

from __future__ import annotations

import asyncio
import threading
import uuid
from abc import abstractmethod
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any

from rlcore.engines.rollout import Completion, GenerationRequest, RolloutEngine
from rlcore.engines.settings import RolloutSpec
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError, WorkerDied, WorkerError
from rlcore_kit.serving.calls import Call, Calls
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.handshake import Handshake
from rlcore_kit.serving.pause_clock import PauseClock
from rlcore_kit.serving.prompts import check_prompt
from rlcore_kit.serving.server_api import ServerAPI
from rlcore_kit.serving.settings import ServerAccessSettings, ServerClientSettings
from rlcore_kit.serving.weight_labels import WeightLabels

_CONTROL_CONNECTIONS = 8
"""Connections in addition to those for completions."""


def open_connection(
    url: str, settings: ServerAccessSettings, api_key: str | None, headers: Mapping[str, str] | None = None
) -> Connection:
    """Open a connection to the server at ``url`` with the limits of ``settings``."""
    return Connection(
        url,
        api_key=api_key,
        headers=headers,
        max_connections=settings.max_connections + _CONTROL_CONNECTIONS,
        retries=settings.retries,
        timeout_s=settings.control_timeout_s,
        connect_timeout_s=settings.connect_timeout_s,
    )


class ServerRollout(RolloutEngine):
    """Generates on one inference server. A backend adds the format of requests and the way of weights.

    HTTP runs on the connection's thread, so methods may be called from any thread and any event loop. After a
    `WorkerError` the server is gone or broken, and this engine is not used again. While the server is paused, asleep or
    takes weights, new requests wait in this process: some servers cannot abort a request that waits with them.

    Args:
        api: the server's control endpoints; the engine closes their connection.
        handshake: with that server.
        labels: shared by all clients of one run.
    """

    def __init__(
        self,
        api: ServerAPI,
        handshake: Handshake,
        spec: RolloutSpec,
        settings: ServerClientSettings,
        labels: WeightLabels,
    ) -> None:
        self.api, self._connection, self._handshake = api, api.connection, handshake
        self._spec, self._client_settings, self._labels = spec, settings, labels
        self._version = handshake.version
        self._requests_url = self.url  # where requests go
        self._slots = asyncio.Semaphore(settings.max_connections)
        self._calls = Calls(self._abort_on_server)
        self._pause_clock = PauseClock()
        self._admitting = asyncio.Event()  # changed on the connection's thread only
        self._admitting.set()
        self._paused = self._asleep = self._weights_dropped = False
        self._wake_lock = asyncio.Lock()
        self._update_lock = threading.Lock()

    @property
    def version(self) -> int:
        """Version of the server's weights."""
        return self._version

    @property
    def url(self) -> str:
        """Base URL of the server."""
        return self._connection.url

    # --- what a backend adds -----------------------------------------------------------------------------------------

    @abstractmethod
    async def _complete(self, call: Call) -> Completion:
        """Generate the completion of ``call``, on the connection's thread."""

    @abstractmethod
    def _prepare_update(self, buckets: Iterable[WeightBucket]) -> Iterable[WeightBucket]:
        """Check and connect all that the server could refuse, before it is paused; return the buckets to send."""

    @abstractmethod
    def _send_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Replace the weights of the paused server."""

    async def _check_health(self) -> None:
        """Raise `WorkerDied` if the server is known to be dead while a request waits for its answer."""

    _check_every_s = float("inf")
    """Seconds between two calls of `_check_health`."""

    # --- generation --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        """Generate one completion; see `RolloutEngine.generate`."""
        check_prompt(request, self._spec.max_model_len, self._handshake.vocabulary)
        return await asyncio.wrap_future(self._connection.submit(self._generate(request)))

    async def _generate(self, request: GenerationRequest) -> Completion:
        with self._calls.begin(request) as call:
            try:
                async with self._slots:
                    return await self._complete(call)
            except asyncio.CancelledError:
                if call.aborted and not call.server_id:
                    return call.completion
                raise

    async def _admit(self, call: Call) -> None:
        """Wait until the server may get requests, and give ``call`` an id under which the server knows it."""
        while True:
            if self._asleep:
                await self._wake_server()
            if self._weights_dropped:
                raise EngineError(
                    f"sleep dropped the weights of {self.url} (sleep_level 2); update them before requests"
                )
            await self._admitting.wait()
            if not self._asleep:
                break
        call.server_id = f"rlcore-{uuid.uuid4().hex}"

    async def _with_timeout(self, call: Call, work: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of ``work``, the answer to ``call``; pauses do not count.

        Raises:
            WorkerDied: it took longer than ``timeout_s``, or the server is dead.
        """
        limit = self._client_settings.timeout_s
        try:
            return await self._pause_clock.with_timeout(
                limit, work, check=self._check_health, check_every_s=self._check_every_s
            )
        except TimeoutError:
            diagnosis = await self.api.diagnose(self._client_settings.connect_timeout_s)
            raise WorkerDied(
                f"{self._requests_url} did not complete request {call.request.request_id!r} within {limit:g} s "
                f"(timeout_s): {diagnosis}"
            ) from None

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """Abort unfinished requests, all by default."""
        self._run(self._calls.abort(request_ids), "abort requests")

    async def _abort_on_server(self, calls: Sequence[Call]) -> None:
        await self.api.abort([call.server_id for call in calls])

    # --- weights -----------------------------------------------------------------------------------------------------

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Replace the weights while the server is paused; unfinished requests continue with the new ones.

        Raises:
            EngineError: the weights are not the model's, or the server refuses the update.
            WorkerError: the server failed to take them. In both cases a server that may hold a mixture stays paused
                until an update succeeds.
        """
        with self._update_lock:
            self._run(self._wake_server(), "wake up")
            stream = self._prepare_update(buckets)
            self._run(self._pause_server(), "pause")
            self.api.set_weight_label(self._labels.updating)
            self._send_weights(stream, version)
            self.api.reset_prefix_cache()
            self.api.set_weight_label(self._labels.label(version))
            self._version = self._labels.version_of(self.api.weight_label())
            if self._version != version:
                raise WorkerError(f"{self.url} attests version {self._version} after an update to {version}")
            self._weights_dropped = False
            if not self._paused:
                self._run(self._resume_server(), "resume")

    # --- pause and sleep ---------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Pause decoding; unfinished requests are kept."""
        self._paused = True
        self._run(self._pause_server(), "pause")

    def resume(self) -> None:
        """Continue after `pause`."""
        self._paused = False
        if not self._asleep:
            self._run(self._resume_server(), "resume")

    def sleep(self) -> None:
        """Have the server release its device memory; without effect on the CPU."""
        if not self._asleep:
            self._run(self._hold(self.api.sleep()), "sleep")
            self._asleep = True

    def wake(self) -> None:
        """Undo `sleep`."""
        self._run(self._wake_server(), "wake up")

    async def _pause_server(self) -> None:
        await self._hold(self.api.pause())

    async def _hold(self, pausing: Coroutine[Any, Any, None]) -> None:
        """Await ``pausing`` while new requests are held back; from then on time does not count."""
        self._admitting.clear()
        await pausing
        self._pause_clock.begin()

    async def _resume_server(self) -> None:
        await self.api.resume()
        self._pause_clock.end()
        self._admitting.set()

    async def _wake_server(self) -> None:
        async with self._wake_lock:
            if self._asleep:
                await self.api.wake()
                self._asleep = False
                if not self._paused and not self._weights_dropped:
                    await self._resume_server()

    def close(self) -> None:
        """Disconnect; the server stays up, and requests that it has for this client end."""
        self._connection.close()

    def _run(self, work: Coroutine[Any, Any, None], what: str) -> None:
        self._connection.wait_for(work, what)
