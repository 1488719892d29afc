"""`ServerRollout`: an SGLang server as a `RolloutEngine`."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from rlcore.engines import Completion, GenerationRequest, RolloutEngine, RolloutSpec, WeightBucket
from rlcore.errors import EngineError, WorkerDied, WorkerError
from rlcore_kit.serving.calls import Call, Calls
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.prompts import check_prompt
from rlcore_kit.serving.standstill import Standstill
from rlcore_kit.serving.versions import Versions
from rlcore_sglang import requests
from rlcore_sglang.config import SGLangSettings
from rlcore_sglang.greeting import Greeting, greet
from rlcore_sglang.process import ServerProcess
from rlcore_sglang.weights import checked, open_delivery, shapes_of

CONTROL_CONNECTIONS = 8
"""Connections beyond those for completions."""
WATCH_S = 2.0
"""How often a request that is waited for looks at the server's processes."""
HEALTH_S = 60.0
"""Longest wait for a server to say whether it is well, which by itself it ponders for 20 s."""
MEMORY = ["kv_cache", "weights"]
"""What `ServerRollout.sleep` gives back."""


class ServerRollout(RolloutEngine):
    """Generates on the server at ``url``.

    HTTP runs on a thread of its own, so methods may be called from any thread and any event loop. A `WorkerError` means
    that the server is gone or broken: make another engine for it when it is back.

    Args:
        versions: shared by all clients of one run.
        process: of the server, if it was started for this engine, which ends it when it is closed.

    Raises:
        EngineError, WorkerError: see `rlcore_sglang.greeting.greet`.
    """

    def __init__(
        self,
        url: str,
        spec: RolloutSpec,
        settings: SGLangSettings,
        versions: Versions,
        process: ServerProcess | None = None,
    ) -> None:
        self._spec, self._settings, self._versions, self._process = spec, settings, versions, process
        self._connection = self._connect(url)
        router = settings.router
        self._generating = self._connection if router is None else self._connect(router)
        # the router may have given a request to any server
        others = () if router is None else tuple(other.rstrip("/") for other in settings.urls)
        self._holders = [self._connection, *(self._connect(other) for other in others if other != url)]
        try:
            ours = None if process is None else settings.sampling_backend
            self._greeting: Greeting = greet(
                self._connection, spec, versions, ours=ours, timeout_s=settings.weights_timeout_s
            )
        except BaseException:
            self.close()
            raise
        self._version = self._greeting.version
        self._shapes = shapes_of(spec.model.path)
        self._delivery = open_delivery(self._connection, settings, self._greeting.workers)
        self._slots = asyncio.Semaphore(settings.max_connections)
        self._open = asyncio.Event()  # set on the connection's thread alone
        self._connection.submit(self._gate()).result()
        self._calls = Calls(self._abort)
        self._interrupted = set[Call]()  # by a pause that aborts; they go on afterwards
        self._standstill = Standstill()
        self._paused = self._asleep = self._dropped = False
        self._last_sign = time.monotonic()
        self._looking, self._waking = asyncio.Lock(), asyncio.Lock()
        self._updates = threading.Lock()

    def _connect(self, url: str) -> Connection:
        settings = self._settings
        return Connection(
            url,
            api_key=settings.api_key() if self._process is None else self._process.api_key,
            most=settings.max_connections + CONTROL_CONNECTIONS,
            retries=settings.retries,
            timeout_s=settings.control_timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
        )

    @property
    def version(self) -> int:
        return self._version

    @property
    def url(self) -> str:
        return self._connection.url

    # --- generating --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        check_prompt(request, self._spec.max_model_len, self._greeting.vocabulary)
        if request.sampling.min_p and not self._greeting.min_p:
            raise EngineError(
                f"{self.url} runs deterministic inference, under which SGLang ends at a request with min_p; start it "
                "with --sampling-backend rlcore instead"
            )
        try:
            return await asyncio.wrap_future(self._connection.submit(self._generate(request)))
        except WorkerDied as error:
            raise error if self._process is None else await asyncio.to_thread(self._process.explain, error) from error

    async def _generate(self, request: GenerationRequest) -> Completion:
        made = Completion([], [], "abort", request_id=request.request_id)
        ends = requests.ends_of(request, self._greeting.end_tokens)
        with self._calls.begin(request) as call:
            try:
                async with self._slots:
                    while True:
                        await self._admitted()
                        answer = await self._part(call, requests.continued(request, made), ends)
                        made = requests.joined(made, requests.completion(request, answer, self.url, self._versions))
                        cut = made.finish_reason == "abort" and call in self._interrupted and not call.aborted
                        if not cut and not requests.ended_too_early(request, answer, ends):
                            return made
                        if self._room(request, made) == 0:
                            return requests.joined(made, Completion([], [], "length", request_id=request.request_id))
                        self._interrupted.discard(call)
            except asyncio.CancelledError:
                if call.aborted and not call.server_id:
                    return made
                raise
            finally:
                self._interrupted.discard(call)

    def _room(self, request: GenerationRequest, made: Completion) -> int:
        """Tokens that may still be made."""
        most = min(request.sampling.max_tokens, self._spec.max_model_len - len(request.prompt))
        return most - len(made.tokens)

    async def _part(self, call: Call, request: GenerationRequest, ends: frozenset[int]) -> Any:
        """The server's answer, to the end or to the next interruption."""
        call.server_id = f"rlcore-{uuid.uuid4().hex}"
        room = self._spec.max_model_len - len(request.prompt)
        body = requests.body(request, call.server_id, room, ends)
        what = f"complete request {request.request_id!r}"
        try:
            return await self._patiently(self._asked(body, what))
        finally:
            call.server_id = ""

    async def _asked(self, body: dict[str, Any], what: str) -> Any:
        if self._generating is self._connection:
            return await self._connection.request("POST", requests.PATH, what, body=body)
        return await asyncio.wrap_future(
            self._generating.submit(self._generating.request("POST", requests.PATH, what, body=body))
        )

    async def _patiently(self, work: Coroutine[Any, Any, Any]) -> Any:
        limit = self._settings.timeout_s
        every = min(self._settings.health_interval_s, WATCH_S)
        try:
            answer = await self._standstill.within(limit, work, look=self._look, look_every_s=every)
        except TimeoutError:
            raise WorkerDied(f"{self._generating.url} completed a request not within {limit:g} s (timeout_s)") from None
        self._last_sign = time.monotonic()
        return answer

    async def _look(self) -> None:
        """Ask the server whether it is well, if it has said nothing for long; it is not asked while it stands still."""
        process = self._process
        if process is not None and (failure := await asyncio.to_thread(lambda: process.failure)) is not None:
            raise WorkerDied(failure)
        async with self._looking:
            if time.monotonic() - self._last_sign < self._settings.health_interval_s:
                return
            stood = self._standstill.seconds()
            try:
                await self._connection.request("GET", "/health", "say whether it is well", timeout_s=HEALTH_S)
            except (WorkerError, EngineError) as error:
                if self._standstill.seconds() == stood:
                    raise WorkerDied(f"{self.url} hangs: {error}") from error
            self._last_sign = time.monotonic()

    async def _admitted(self) -> None:
        """Wait for the end of a pause here: a request that waits at the server's door cannot be aborted (0.5)."""
        while True:
            if self._asleep:
                await self._awake()
            if self._dropped:
                raise EngineError("sleep_level 2 dropped the weights; update them before requests")
            await self._open.wait()
            if not self._asleep:
                return

    async def _awake(self) -> None:
        async with self._waking:
            if self._asleep:
                await self._control("/resume_memory_occupation", "take its memory back", {"tags": MEMORY})
                self._asleep = False
                if not self._paused and not self._dropped:
                    await self._go_on()

    # --- control -----------------------------------------------------------------------------------------------------

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Take over the weights while the server is paused; see ``pause_mode``.

        Raises:
            EngineError: the weights are not the model's.
            WorkerError: the server failed to take them. In either case it stays paused, because it holds a mixture,
                until an update succeeds.
        """
        stream = iter(checked(buckets, self._shapes))
        with self._updates:
            first = next(stream, None)
            if first is None:
                raise EngineError("the weight update is empty")
            self._connection.wait_for(self._awake(), "wake up")
            self._delivery.prepare(first.tensors[0][1].device)
            self._connection.wait_for(self._stand_still(self._settings.pause_mode), "pause")
            self._label(self._versions.updating)
            self._delivery.send(_chained(first, stream))
            del first
            if self._settings.pause_mode != "in_place":  # what it keeps for unfinished requests cannot be flushed
                self._connection.ask("POST", "/flush_cache", "forget cached prefixes", plain=True)
            self._label(self._versions.label(version))
            self._version = self._attested()
            if self._version != version:
                raise WorkerError(f"{self.url} attests version {self._version} after an update to {version}")
            self._dropped = False
            if not self._paused:
                self._connection.wait_for(self._go_on(), "go on")

    def _label(self, label: str) -> None:
        body = {"new_version": label, "abort_all_requests": False}
        self._ask("/update_weight_version", "label its weights", body)

    def _attested(self) -> int:
        answer = self._connection.ask("GET", "/model_info", "tell its weights' version")
        return self._versions.number(str(answer["weight_version"]))

    def pause(self) -> None:
        self._paused = True
        self._connection.wait_for(self._stand_still(self._settings.pause_mode), "pause")

    async def _stand_still(self, mode: str) -> None:
        self._open.clear()
        if mode == "abort":
            self._interrupted |= {call for call in self._calls if call.server_id}
        await self._control("/pause_generation", "pause", {"mode": mode})
        self._standstill.begin()

    def resume(self) -> None:
        self._paused = False
        if not self._asleep:
            self._connection.wait_for(self._go_on(), "go on")

    async def _go_on(self) -> None:
        await self._control("/continue_generation", "go on", {})
        self._standstill.end()
        self._last_sign = time.monotonic()
        self._open.set()

    async def _gate(self) -> None:
        self._open.set()

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        self._connection.wait_for(self._calls.abort(request_ids), "abort requests")

    async def _abort(self, calls: Sequence[Call]) -> None:
        asked = [
            holder.submit(
                holder.request(
                    "POST",
                    "/abort_request",
                    "abort a request",
                    body={"rid": call.server_id},
                    timeout_s=holder.timeout_s,
                )
            )
            for call in calls
            for holder in self._holders
        ]
        await asyncio.gather(*map(asyncio.wrap_future, asked))

    def sleep(self) -> None:
        """Have the server give its memory back; see ``sleep_level``. On the CPU it keeps it."""
        if not self._asleep:
            # whatever pause_mode is: it ends if it has anything running when it is to give memory back
            self._connection.wait_for(self._stand_still("retract"), "pause")
            self._ask("/release_memory_occupation", "give its memory back", {"tags": MEMORY})
            self._asleep = True
            self._dropped = self._settings.sleep_level == 2

    def wake(self) -> None:
        self._connection.wait_for(self._awake(), "wake up")

    def close(self) -> None:
        """Let the server go, or end it if it was started for this engine."""
        if hasattr(self, "_delivery"):
            self._delivery.close()
        for connection in {self._connection, self._generating, *self._holders}:
            connection.close()
        if self._process is not None:
            self._process.stop()

    def _ask(self, path: str, what: str, body: Any) -> None:
        self._connection.ask("POST", path, what, body=body)

    async def _control(self, path: str, what: str, body: Any) -> None:
        await self._connection.request("POST", path, what, body=body, timeout_s=self._connection.timeout_s)


def _chained(first: WeightBucket | None, rest: Iterable[WeightBucket]) -> Iterable[WeightBucket]:
    assert first is not None
    yield first
    first = None  # two buckets exist at most
    yield from rest
