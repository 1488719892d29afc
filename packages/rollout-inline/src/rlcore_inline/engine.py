"""`InlineRollout`: the `RolloutEngine` in pure PyTorch, with a training engine's weights or a copy of the model."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from transformers import PreTrainedModel

from rlcore.engines.rollout import Completion, GenerationRequest, RolloutEngine
from rlcore.engines.settings import ModelSettings, RolloutSpec
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.engines.weight_lender import WeightLender
from rlcore.errors import EngineError
from rlcore.progress import report
from rlcore_inline.decoder_choice import allocate_cache, choose_decoder
from rlcore_inline.direct import DirectDecoder
from rlcore_inline.generic import GenericDecoder
from rlcore_inline.kv_cache import KVCache, LayerShape
from rlcore_inline.scheduler import Decoder, Scheduler
from rlcore_inline.seeds import stream_start
from rlcore_inline.sequence import Sequence as RunningSequence
from rlcore_inline.settings import InlineSettings
from rlcore_inline.stopping import StopStrings, end_tokens
from rlcore_inline.weights import ModelCopy
from rlcore_kit.model_folder.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

POLL_S = 0.005
"""Seconds between checks of a paused engine whether it may continue."""
WARN_AFTER_S = 60
"""Seconds after which a batch warns that it waits for a paused engine."""


def build(spec: RolloutSpec) -> InlineRollout:
    """Build the engine over the weights of ``spec.train_engine``, or over a separate copy of the model if it is None.

    Raises:
        EngineError: ``spec.train_engine`` is no `WeightLender`, or the model cannot be loaded or cannot generate.
    """
    source = spec.train_engine
    if source is None:
        return InlineRollout(ModelCopy(spec.model, cast(InlineSettings, spec.options)), spec)
    if not isinstance(source, WeightLender):
        raise EngineError(
            "the inline rollout generates with weights that a training engine in its process lends it, but "
            f"{type(source).__name__} does not lend its weights (see rlcore.engines.WeightLender); place the rollout "
            "on another pool than the actor, choose another rollout engine, or train with fsdp"
        )
    return InlineRollout(source, spec)


class InlineRollout(RolloutEngine):
    """Continuous batching over the weights of ``source``.

    Requests run under one scheduler, which has no thread: the waiting callers drive it. `generate_batch` drives it
    until its requests are done; for `generate` one task per event loop does. The order of all steps is therefore that
    of the calls. Methods may be called from any thread.

    The engine holds the lent weights while it has requests, and from `wake` to `sleep`. With data parallelism,
    borrowing is a collective operation, which must not depend on when a rank runs out of requests: `generate_batch`,
    `wake`, `update_weights` and `sleep` are called on every rank, as dispatch does, and `wake` is called before
    `generate` is used without `generate_batch`. `sleep` returns the weights; it must be called before training.

    With a `ModelCopy` there are no collective operations. `update_weights` replaces the weights; meanwhile decoding is
    paused, and all other methods may be called.
    """

    def __init__(self, source: WeightLender, spec: RolloutSpec) -> None:
        self._source = source
        self._model_settings: ModelSettings = spec.model
        self._settings = cast(InlineSettings, spec.options)
        self._max_model_len = spec.max_model_len
        self._seeds = random.Random(f"{spec.seed}/{source.dp_rank}")
        self._arrivals = itertools.count()
        settings = self._settings
        self._scheduler = Scheduler(
            settings.max_running, settings.prefill_tokens, source.device, settings.batch_invariant
        )
        self._cache: KVCache | None = None
        self._held: ExitStack | None = None  # returns the borrowed weights
        self._held_at = -1  # the source's step_count when they were borrowed
        self._keep = False  # hold the weights until `sleep`, with or without requests
        self._decoder: Decoder | None = None  # valid while the weights are held
        self._decoder_class: type[Decoder] | None = None  # once chosen and verified
        self._shapes: list[LayerShape] = []
        self._end_tokens: frozenset[int] = frozenset()
        self._vocabulary = 0
        self._tokenizer: Any = None
        self._version = 0
        self._paused = False
        self._asleep = False
        self._loading = False  # weights are being replaced, nothing may be computed with them
        self._updates = threading.Lock()  # held while a ModelCopy changes or moves; acquired before self._lock
        self._lock = threading.RLock()
        self._lock_requests: list[None] = []  # one entry per caller that waits for the lock between two steps
        self._drivers: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}
        if not self.shares_weights:
            self._borrow()  # reports errors now, and allows to check requests during a weight update
            self._release()

    @property
    def version(self) -> int:
        return self._version

    @property
    def shares_weights(self) -> bool:
        return not isinstance(self._source, ModelCopy)

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank of the training engine; 0 with a `ModelCopy`."""
        return self._source.dp_rank

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks of the training engine; 1 with a `ModelCopy`."""
        return self._source.dp_size

    # --- generating ------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()

        def done(outcome: Completion | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, future, outcome)

        with self._between_steps():
            try:
                sequence = self._submit(request, done)
            finally:
                self._release_if_idle()
        driver = self._drivers.get(loop)
        if driver is None or driver.done():
            self._drivers = {known: task for known, task in self._drivers.items() if not known.is_closed()}
            self._drivers[loop] = loop.create_task(self._drive())
        try:
            return await future
        except asyncio.CancelledError:
            with self._between_steps():
                self._scheduler.remove([sequence], self._cache)
            raise

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        outcomes: dict[int, Completion | Exception] = {}
        submitted: list[RunningSequence] = []
        warn_at = time.monotonic() + WARN_AFTER_S
        try:
            with self._between_steps():
                self._wake()
                for index, request in enumerate(requests):
                    submitted.append(self._submit(request, partial(outcomes.__setitem__, index)))
            finished = 0
            while len(outcomes) < len(requests):
                if not self._advance():
                    time.sleep(POLL_S)
                    if time.monotonic() > warn_at:
                        warn_at = math.inf
                        logger.warning("generate_batch waits: the engine is paused or asleep; call resume() or wake()")
                if len(outcomes) > finished:
                    finished = len(outcomes)
                    report("completions generated", finished, len(requests))
        finally:
            with self._between_steps():
                if len(outcomes) < len(submitted):
                    self._scheduler.remove(submitted, self._cache)
                if not self._keep and not self._scheduler.unfinished:
                    self._release()
        completions: list[Completion] = []
        for index in range(len(requests)):
            outcome = outcomes[index]
            if isinstance(outcome, Exception):
                raise outcome
            completions.append(outcome)
        return completions

    async def _drive(self) -> None:
        """Step until no request is unfinished, and yield to the event loop after every step."""
        while self._scheduler.unfinished:
            await asyncio.sleep(0 if self._advance() else POLL_S)
        with self._between_steps():
            self._release_if_idle()

    def _advance(self) -> bool:
        """Make one step; return False if the engine is paused, asleep or needed by another caller."""
        if self._lock_requests:
            return False
        with self._lock:
            if self._paused or self._asleep or self._loading:
                return False
            if not self._scheduler.unfinished:
                return True
            try:
                self._wake()
                assert self._decoder is not None
                assert self._cache is not None
                ended = self._scheduler.step(self._decoder, self._cache)
            except Exception as error:
                self._cache = None  # it may hold NaN
                for sequence in self._scheduler.clear():
                    sequence.done(error)
                return True
            for sequence, reason in ended:
                sequence.finish(reason, self._version)
            return True

    def _submit(self, request: GenerationRequest, done: Callable[[Completion | Exception], None]) -> RunningSequence:
        self._wake()
        sampling = request.sampling
        prompt = tuple(request.prompt)
        if not prompt:
            raise EngineError(f"request {request.request_id!r} has an empty prompt; it needs at least one token")
        if len(prompt) >= self._max_model_len:
            raise EngineError(
                f"the prompt of request {request.request_id!r} has {len(prompt)} tokens, which leaves none to generate "
                f"within max_model_len {self._max_model_len}; shorten the prompt or raise max_model_len"
            )
        if min(prompt) < 0 or max(prompt) >= self._vocabulary:
            raise EngineError(
                f"the prompt of request {request.request_id!r} has a token outside the model's vocabulary of "
                f"{self._vocabulary}; make prompts with the model's tokenizer"
            )
        seed = self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed
        sequence = RunningSequence(
            request=request,
            order=(request.priority, next(self._arrivals)),
            prompt=prompt,
            end_tokens=frozenset(sampling.stop_token_ids).union(() if sampling.ignore_eos else self._end_tokens),
            limit=min(sampling.max_tokens, self._max_model_len - len(prompt)),
            stream=stream_start(seed),
            stop_strings=StopStrings(sampling.stop, self._load_tokenizer()) if sampling.stop else None,
            done=done,
        )
        self._scheduler.add(sequence)
        return sequence

    # --- control ---------------------------------------------------------------------------------------------------

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Load the weights in ``buckets``; with lent weights, which must come with no buckets, only set the version.

        Unfinished requests are prefilled again with the tokens that they have.

        Raises:
            EngineError: ``buckets`` is not empty though the weights are lent, or does not hold the model's parameters;
                in the latter case requests fail until an update succeeds.
        """
        with self._updates:
            with self._between_steps():
                for sequence in (*self._scheduler.waiting, *self._scheduler.running):
                    sequence.close_span(self._version)
                self._scheduler.evict_all()
                held = self._held is not None
                self._release()
                self._loading = True
            try:
                if isinstance(self._source, ModelCopy):
                    self._source.load(buckets)
                else:
                    for _ in buckets:
                        raise EngineError(
                            "this inline rollout generates with weights that the training engine lends it; call "
                            "update_weights without buckets"
                        )
                with self._between_steps():
                    self._version = version
                    if held:
                        self._borrow()
            finally:
                self._loading = False

    def pause(self) -> None:
        self._paused = True
        with self._between_steps():
            pass  # waits until the current step has ended

    def resume(self) -> None:
        self._paused = False

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        with self._between_steps():
            ended = [
                sequence
                for sequence in (*self._scheduler.waiting, *self._scheduler.running)
                if request_ids is None or sequence.request.request_id in request_ids
            ]
            self._scheduler.remove(ended, self._cache)
            for sequence in ended:
                sequence.finish("abort", self._version)

    def sleep(self) -> None:
        """Free the cache and return the weights. Unfinished requests wait, and are prefilled again after `wake`."""
        with self._updates, self._between_steps():
            self._asleep = True
            self._scheduler.evict_all()
            self._cache = None
            self._keep = False
            self._release()
            if isinstance(self._source, ModelCopy):
                self._source.offload()

    def wake(self) -> None:
        with self._between_steps():
            self._wake()
            self._keep = True

    def close(self) -> None:
        self.abort()
        self.sleep()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Hold the scheduler exclusively; callers that drive it from other threads stop stepping meanwhile."""
        self._lock_requests.append(None)
        try:
            with self._lock:
                yield
        finally:
            self._lock_requests.pop()

    # --- weights and cache -----------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Borrow the weights and make decoder and cache, unless a weight update is in progress."""
        self._asleep = False
        if self._loading:
            return
        if self._held is not None and self._held_at != self._source.step_count:
            if self.dp_size > 1:
                raise EngineError(
                    "the policy was trained while the inline rollout held its full weights; call the rollout's sleep() "
                    "before training"
                )
            self._scheduler.evict_all()
            self._release()
        if self._held is None:
            self._borrow()
        assert self._decoder is not None
        if self._cache is None:
            self._cache = allocate_cache(self._decoder, self._settings, self._max_model_len, self._source.device)

    def _borrow(self) -> None:
        """Borrow the full weights; with data parallelism on all ranks together."""
        held = ExitStack()
        model = cast(PreTrainedModel, held.enter_context(self._source.generation_weights()))
        try:
            self._decoder = self._make_decoder(model)
        except BaseException:
            held.close()
            raise
        self._held, self._held_at = held, self._source.step_count

    def _release_if_idle(self) -> None:
        """Return the weights after the last request, unless other ranks would have to take part."""
        if self.dp_size == 1 and not self._keep and not self._scheduler.unfinished:
            self._release()

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
        self._held = self._decoder = None

    def _make_decoder(self, model: PreTrainedModel) -> Decoder:
        """Make the decoder; choose and verify it the first time."""
        if self._decoder_class is DirectDecoder:
            return DirectDecoder(model)
        if self._decoder_class is GenericDecoder:
            return GenericDecoder(model, self._shapes)
        decoder = choose_decoder(model, self._model_settings, self._settings, self._max_model_len, self._source.device)
        self._decoder_class, self._shapes = type(decoder), decoder.shapes
        embeddings: Any = model.get_input_embeddings()
        self._vocabulary = embeddings.num_embeddings
        self._end_tokens = end_tokens(model)
        return decoder

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._model_settings)
        return self._tokenizer


def _settle(future: asyncio.Future[Completion], outcome: Completion | Exception) -> None:
    if future.done():
        return  # the request was cancelled
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
