"""`VLLMRollout`: vLLM behind the `RolloutEngine` contract."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from rlcore.engines.rollout import Completion, GenerationRequest, RolloutEngine
from rlcore.engines.settings import RolloutSpec
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError, WorkerError
from rlcore_kit.serving.prompts import check_prompt
from rlcore_kit.serving.replicas import Replicas
from rlcore_vllm import quirks
from rlcore_vllm.backend import Backend
from rlcore_vllm.delivery import Delivery
from rlcore_vllm.request_conversion import NO_OVERRIDES, completion, sampling_params
from rlcore_vllm.settings import VLLMSettings
from rlcore_vllm.vllm_transfer import VLLMTransfer

logger = logging.getLogger(__name__)

REMEDY = "the next weight update starts another engine"


def build(spec: RolloutSpec) -> RolloutEngine:
    """Build the rollout engine that ``spec.options`` describes.

    Raises:
        EngineError: vLLM is missing or too old, refuses an argument, or cannot start; the message holds its reason.
    """
    settings = cast(VLLMSettings, spec.options)
    if settings.mode == "server":
        from rlcore_vllm import server

        return server.build(spec)
    quirks.require_vllm()
    if settings.replicas == 1:
        return VLLMRollout(spec)
    return Replicas(
        [partial(VLLMRollout, spec, index) for index in range(settings.replicas)],
        names=[f"vLLM engine {index}" for index in range(settings.replicas)],
        seed=spec.seed,
        timeout_s=settings.update_timeout_s,
        rejoin_timeout_s=settings.rejoin_timeout_s,
    )


class VLLMRollout(RolloutEngine):
    """One vLLM engine, in this process or a separate one.

    Completions have the version of every token as vLLM's scheduler labelled it; `version` is the one that all workers
    report. Generation is paused during an update, and unfinished requests are prefilled again afterwards.

    An update that fails midway leaves weights of two versions in the model: requests fail until an update succeeds. If
    an engine process died or hangs, its requests fail with `WorkerDied`; if an engine in this process failed in a step,
    with `WorkerError`. The next update starts another engine.

    Args:
        index: position among the engines that divide the GPUs.
    """

    def __init__(self, spec: RolloutSpec, index: int = 0) -> None:
        self._spec, self._index = spec, index
        self._settings = cast(VLLMSettings, spec.options)
        self._seeds = random.Random(f"{spec.seed}/vllm")
        self._keys = itertools.count()
        self._requests: dict[str, GenerationRequest] = {}  # unfinished, by their key in vLLM
        self._lock = threading.Lock()  # guards the state below; not held while waiting for vLLM
        self._control = threading.RLock()  # one control operation at a time
        self._version = 0
        self._paused = self._asleep = self._closed = False
        self._unusable: str | None = None  # why requests fail at the moment
        self._lost: WorkerError | None = None  # why the backend was given up
        self._stopping = threading.Event()
        self._arrived = threading.Event()  # set while requests are unfinished
        self._backend = self._start()
        self._watch = threading.Thread(target=self._watch_over, name="vllm-watch", daemon=True)
        self._watch.start()

    @property
    def version(self) -> int:
        """Version of the weights that all workers hold."""
        return self._version

    @property
    def takes_adapters(self) -> bool:
        """True if updates bring LoRA adapters."""
        return self._settings.enable_lora

    @property
    def vllm_config(self) -> Any:
        """vLLM's ``VllmConfig``."""
        return self._backend.config

    # --- generating ------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        """Generate one completion; see `RolloutEngine.generate`."""
        return (await self.generate_with(request))[0]

    async def generate_with(
        self, request: GenerationRequest, overrides: Mapping[str, Any] = NO_OVERRIDES
    ) -> tuple[Completion, Any]:
        """Generate with further fields of vLLM's ``SamplingParams``; also return its ``RequestOutput``.

        Args:
            overrides: such as ``logprobs`` (the k most likely tokens), ``prompt_logprobs``, ``structured_outputs`` or
                penalties.

        Raises:
            EngineError: as `generate`, or vLLM refuses a field.
            WorkerError: the engine is gone.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if self._asleep:
            await asyncio.to_thread(self.wake)
        check_prompt(request, self._spec.max_model_len, self._vocabulary)
        with self._lock:
            seed = self._seeds.getrandbits(62)
        params = sampling_params(request, self._spec.max_model_len, self._end_tokens, seed, overrides)
        key = str(next(self._keys))

        def done(outcome: Any) -> None:
            self._requests.pop(key, None)
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, future, outcome)

        with self._lock:
            self._check_usable()
            self._requests[key] = request
            self._backend.submit(key, list(request.prompt), params, request.priority, done)
        self._arrived.set()
        try:
            output = await future
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.to_thread(self._abort_keys, [key]))
            raise
        except EngineError:
            self._check_running()  # the engine was closed because it failed
            raise
        return completion(request, output), output

    # --- control ---------------------------------------------------------------------------------------------------

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Replace the weights.

        Args:
            buckets: all weights of the model under their Hugging Face names, or with ``enable_lora`` all adapters
                (`TrainEngine.export_adapters`).

        Raises:
            EngineError: weights do not fit or are missing; then requests fail until an update succeeds.
            WorkerError: the engine is gone, or does not answer.
        """
        with self._control:
            self._check_open()
            if self._gone is not None:
                self._restart()
            if self._asleep:
                self._backend.wake(["weights"])
            with self._held():
                self._unusable = f"the weight update {version} failed midway; update the weights again"
                self._delivery.load(buckets, version)
                held = self._backend.call_workers("rlcore_version", timeout_s=self._settings.update_timeout_s)
                if set(held) != {version}:
                    raise EngineError(f"after the weight update {version} vLLM's workers report the versions {held}")
                self._backend.forget_prefixes(version)
                self._version, self._unusable = version, None

    def pause(self) -> None:
        """Pause generation; unfinished requests are kept."""
        with self._control:
            self._check_open()
            self._backend.pause()
            self._paused = True

    def resume(self) -> None:
        """Continue after `pause`."""
        with self._control:
            self._check_open()
            self._paused = False
            if not self._asleep:
                self._backend.resume()

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """Abort unfinished requests, all by default."""
        wanted = None if request_ids is None else set(request_ids)
        self._abort_keys(
            [key for key, request in list(self._requests.items()) if wanted is None or request.request_id in wanted]
        )

    def sleep(self) -> None:
        """Release the KV cache, and the weights as ``sleep_level`` says; unfinished requests wait."""
        with self._control:
            if self._asleep or self._closed or self._lost is not None:
                return
            level = self._settings.sleep_level
            self._backend.pause()
            self._backend.forget_prefixes(None)
            if self._backend.config.model_config.enable_sleep_mode:
                self._backend.sleep(level)
            self._asleep = True
            if level == 2:
                self._unusable = "sleep dropped the weights (sleep_level 2); update them before requests"

    def wake(self) -> None:
        """Undo `sleep`."""
        with self._control:
            if not self._asleep or self._lost is not None:
                return
            self._check_open()
            self._backend.wake(None)
            self._asleep = False
            if self._paused:
                self._backend.pause()
            else:
                self._backend.resume()

    def close(self) -> None:
        """End vLLM's threads and processes; idempotent. Unfinished requests fail."""
        with self._control:
            if self._closed:
                return
            self._closed = True
            self._stopping.set()
            self._arrived.set()
            self._delivery.close()
            self._backend.close(kill=self._lost is not None)
        self._watch.join(timeout=10)

    # --- internals -------------------------------------------------------------------------------------------------

    def _start(self) -> Backend:
        backend = _start_backend(self._spec, self._settings, self._index)
        try:
            backend.call_workers("rlcore_prepare", self._settings.enable_lora, timeout_s=self._settings.start_timeout_s)
        except BaseException:
            backend.close(kill=True)
            raise
        self._delivery = _delivery(backend, self._settings)
        model = backend.config.model_config
        self._vocabulary = int(model.get_vocab_size())
        self._end_tokens = _end_tokens(model)
        return backend

    def _restart(self) -> None:
        logger.warning("starting another vLLM engine in place of the one that is gone")
        self._lost = self._gone  # still true if the new engine does not start
        self._delivery.close()
        self._backend.close(kill=True)
        self._backend = self._start()
        self._lost, self._asleep = None, False
        self._version = 0
        if self._paused:
            self._backend.pause()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Run no step inside the context; restore the previous state afterwards."""
        self._backend.pause()
        try:
            yield
        finally:
            if not (self._paused or self._asleep):
                self._backend.resume()

    def _abort_keys(self, keys: list[str]) -> None:
        if keys and self._lost is None:
            self._backend.abort(keys)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the vLLM engine is closed")

    @property
    def _gone(self) -> WorkerError | None:
        return self._lost or self._backend.failure

    def _check_running(self) -> None:
        self._check_open()
        gone = self._gone
        if gone is not None:
            raise type(gone)(f"{gone}; {REMEDY}")

    def _check_usable(self) -> None:
        self._check_running()
        if self._unusable is not None:
            raise EngineError(self._unusable)

    def _watch_over(self) -> None:
        """Check that the engine reacts while requests are unfinished; give it up if it does not."""
        timeout_s = self._settings.hang_timeout_s
        while not self._stopping.is_set():
            if not self._requests:
                self._arrived.clear()
                self._arrived.wait()
            if self._stopping.wait(min(timeout_s / 4, 10)) or not self._requests or self._gone is not None:
                continue
            try:
                self._backend.probe(timeout_s)
            except WorkerError as error:
                if not self._stopping.is_set():
                    self._give_up(error)

    def _give_up(self, error: WorkerError) -> None:
        with self._lock:
            self._lost = error
        logger.warning("%s; %s", error, REMEDY)
        self._backend.close(kill=True)


def _delivery(backend: Backend, settings: VLLMSettings) -> Delivery | VLLMTransfer:
    if settings.weight_transfer == "rlcore":
        return Delivery(backend, settings.update_timeout_s)
    return VLLMTransfer(backend, settings.weight_transfer, settings.update_timeout_s)


def _start_backend(spec: RolloutSpec, settings: VLLMSettings, index: int) -> Backend:
    quirks.set_environment(settings.tensor_parallel_size, own_process=settings.mode == "process")
    with quirks.undisturbed():  # importing vllm sets environment variables too
        from vllm.platforms import current_platform

        from rlcore_vllm.arguments import engine_arguments

    arguments = engine_arguments(
        spec, current_platform.device_type, sleep_mode=current_platform.is_sleep_mode_available(), replica=index
    )
    if settings.mode == "process":
        from rlcore_vllm.engine_process import SeparateProcess

        return SeparateProcess(arguments, settings.start_timeout_s)
    from rlcore_vllm.in_process import InProcess

    return InProcess(arguments, settings.start_timeout_s)


def _end_tokens(model_config: Any) -> frozenset[int]:
    """Return the model's end-of-sequence tokens: of its generation configuration, else of its configuration."""
    for tokens in (
        model_config.try_get_generation_config().get("eos_token_id"),
        getattr(model_config.hf_text_config, "eos_token_id", None),
    ):
        if tokens is not None:
            return frozenset([tokens] if isinstance(tokens, int) else tokens)
    return frozenset()


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():
        return  # cancelled meanwhile
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
