"""`HTTPRollout`: a running inference server, reached by an open protocol, as a `RolloutEngine`.

Completions are streamed token by token, and what ends one (end tokens, stop strings, length, abort, pause) is decided
here, from the ids: servers differ in it. A completion that is interrupted, or that its server ends too early,
continues with the tokens that it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from rlcore.engines.rollout import Completion, FinishReason, GenerationRequest
from rlcore.engines.settings import RolloutSpec
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore_http.control import ClientControl
from rlcore_http.protocol import SEEDS, Abilities, ServerProtocol
from rlcore_http.reload import Reloads
from rlcore_http.settings import HTTPSettings
from rlcore_kit.serving.calls import Call
from rlcore_kit.serving.handshake import Handshake
from rlcore_kit.serving.server_rollout import ServerRollout
from rlcore_kit.serving.weight_labels import WeightLabels
from rlcore_kit.serving.weight_stream import checked, shapes_of
from rlcore_kit.serving.wire_format import ending_tokens, joined

ODD = 0x9E3779B97F4A7C15
"""Step between the seeds of the parts of one completion (2^64 divided by the golden ratio)."""
STOPPED = ("stop", "eos_token")
"""Reasons of servers that sampled an end token. One that is not the request's is special, and the request goes on."""
STOP_MARGIN = 8
"""Tokens, in addition to one per byte of a stop string, in which the string is looked for."""
NO_RELOAD = (
    "the servers of rollout.http keep the weights that they have (reload: none), so training would not change what "
    "they generate; set rollout.http.reload to vllm, sglang or command, or take another rollout engine"
)


@dataclass
class Part:
    """What one stream has brought so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "abort"


class HTTPRollout(ServerRollout):
    """Generates on one server; see `ServerRollout`.

    Args:
        abilities: what the server's sampling does.
        tokenizer: of the policy's model; finds stop strings.
        reloads: gives the server weights.
    """

    def __init__(
        self,
        control: ClientControl,
        protocol: ServerProtocol,
        abilities: Abilities,
        handshake: Handshake,
        spec: RolloutSpec,
        settings: HTTPSettings,
        tokenizer: Any,
        labels: WeightLabels,
        reloads: Reloads,
    ) -> None:
        super().__init__(control, handshake, spec, settings, labels)
        self._control, self._protocol, self._abilities = control, protocol, abilities
        self._settings, self._tokenizer, self._reloads = settings, tokenizer, reloads
        added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._special_tokens = frozenset([*tokenizer.all_special_ids, *added, *handshake.end_tokens])
        if protocol.max_concurrent is not None:
            self._slots = asyncio.Semaphore(min(settings.max_connections, protocol.max_concurrent))

    # --- generation --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        """Generate one completion; see `RolloutEngine.generate`.

        Raises:
            EngineError: the server's sampling cannot do what ``request`` wants.
        """
        if not self._settings.logprobs:
            request = replace(request, sampling=replace(request.sampling, logprobs=False))
        self._check_sampling(request)
        return await super().generate(request)

    def _check_sampling(self, request: GenerationRequest) -> None:
        wanted, can = request.sampling, self._abilities
        for name, asked, able in (("top_k", wanted.top_k, can.top_k), ("min_p", wanted.min_p, can.min_p)):
            if asked and not able:
                raise EngineError(f"{self.url} does not sample with {name}; set rollout.{name} to 0, or use top_p")
        if not wanted.logprobs:
            return
        remedy = "set rollout.http.logprobs=false, and the trainer computes them itself (actor.old_logprobs=recompute)"
        if wanted.temperature not in (0.0, 1.0) and not can.scaled_logprobs:
            raise EngineError(
                f"{self.url} returns log-probs of temperature 1, not of the sampling temperature "
                f"{wanted.temperature:g}; {remedy}"
            )
        if (wanted.top_k or wanted.top_p < 1 or wanted.min_p) and not can.logprobs_before_filters:
            raise EngineError(
                f"{self.url} returns log-probs after top-k, top-p and min-p, not those of the whole vocabulary; "
                f"{remedy}"
            )

    async def _complete(self, call: Call) -> Completion:
        while True:
            await self._admit(call)
            part = Part()
            try:
                await self._with_timeout(call, self._read(call, part))
            finally:
                call.server_id = ""
                found = len(part.tokens)
                spans = [(self._version, found)] if found else []
                done = Completion(part.tokens, part.logprobs, part.finish_reason, spans, call.request.request_id)
                call.completion = joined(call.completion, done)
            if part.finish_reason != "abort" or call.aborted:
                return call.completion

    async def _read(self, call: Call, part: Part) -> None:
        """Stream what is left of ``call`` into ``part``; return early if the stream is interrupted by the control."""
        streams, name = self._control.streams, call.server_id
        task = asyncio.current_task()
        assert task is not None
        streams[name] = task
        try:
            await self._read_stream(call, part)
        except asyncio.CancelledError:
            if name in streams:  # by the caller
                raise
        finally:
            streams.pop(name, None)

    async def _read_stream(self, call: Call, part: Part) -> None:
        ends = ending_tokens(call.request, self._handshake.end_tokens)
        request = _remaining(call.request, call.completion)
        left = min(request.sampling.max_tokens, self._spec.max_model_len - len(request.prompt))
        reason: str | None = None
        async with aclosing(self._protocol.stream(request, left, ends)) as pieces:
            async for piece in pieces:
                reason = piece.finish_reason
                for index, token in enumerate(piece.tokens):
                    part.tokens.append(token)
                    part.logprobs += piece.logprobs[index : index + 1]
                    part.finish_reason = self._end(call, part, ends, left)
                    if part.finish_reason != "abort":
                        return
        if not part.tokens:
            raise EngineError(f"{self.url} ended the completion of request {request.request_id!r} without any token")
        if reason in STOPPED and ends and part.tokens[-1] not in self._special_tokens:
            raise EngineError(
                f"{self.url} ended the completion of request {request.request_id!r} ({reason}) and did not return the "
                "token that ends it, so its ids are not all that were sampled; use vLLM, SGLang or "
                "text-generation-inference"
            )

    def _end(self, call: Call, part: Part, ends: frozenset[int], left: int) -> FinishReason:
        """Return why the completion ends with the last token of ``part``; "abort" if it goes on."""
        token = part.tokens[-1]
        if not 0 <= token < self._handshake.vocabulary:
            raise EngineError(
                f"{self.url} sampled token {token}, outside the model's vocabulary of {self._handshake.vocabulary}; "
                "does it serve another model?"
            )
        if token in ends or self._completes_stop_string(call, part):
            return "stop"
        return "length" if len(part.tokens) >= left else "abort"

    def _completes_stop_string(self, call: Call, part: Part) -> bool:
        stop = call.request.sampling.stop
        if not stop:
            return False
        window = max(len(text.encode()) for text in stop) + STOP_MARGIN
        tokens = [*call.completion.tokens[-window:], *part.tokens[-window:]][-window:]
        decoded = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(text in decoded for text in stop)

    # --- weights -----------------------------------------------------------------------------------------------------

    def _prepare_update(self, buckets: Iterable[WeightBucket]) -> Iterable[WeightBucket]:
        if self._settings.reload == "none":
            raise EngineError(NO_RELOAD)
        return checked(buckets, shapes_of(self._spec.model.path))

    def _send_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        self._reloads.update(self._connection, buckets, version)

    def restore(self) -> None:
        """Have the server load the current weights, after it failed or was restarted."""
        self._version = self._reloads.load_current(self._connection)


def _remaining(request: GenerationRequest, partial: Completion) -> GenerationRequest:
    """Return the request for what is left after ``partial``, with another seed: the same one would repeat its draws."""
    count, wanted = len(partial.tokens), request.sampling
    seed = None if wanted.seed is None else (wanted.seed + ODD * count) % SEEDS
    sampling = replace(wanted, max_tokens=wanted.max_tokens - count, seed=seed)
    return replace(request, prompt=[*request.prompt, *partial.tokens], sampling=sampling)
