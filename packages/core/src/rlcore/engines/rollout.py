"""`RolloutEngine`: tokens in, tokens and their log-probs out."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlcore import event_loop
from rlcore.controller.dispatch import Dispatch, dispatch
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.progress import report

ROLLOUT_ENGINE_INTERFACE = 1

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is sampled.

    Filters apply in this order: temperature, top-k, top-p, min-p.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        top_p: nucleus mass (Holtzman et al., 2019).
        min_p: keep tokens with at least this fraction of the best token's probability.
        stop: strings that end the completion; the text up to and including the token that completes one is kept.
        stop_token_ids: tokens that end the completion, besides the model's end-of-sequence tokens; kept as last token.
        ignore_eos: do not end at end-of-sequence tokens.
        seed: same seed, prompt and weights: same completion, whatever else runs. None draws one.
        logprobs: return the log-prob of every sampled token under softmax(logits / temperature), before the
            top-k/top-p/min-p filters (at temperature 0: under softmax(logits)).
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: bool = True

    def __post_init__(self) -> None:
        problems = [
            text
            for bad, text in (
                (self.max_tokens < 1, f"max_tokens must be at least 1, not {self.max_tokens}"),
                (self.temperature < 0, f"temperature must not be negative, not {self.temperature}"),
                (self.top_k < 0, f"top_k must not be negative (0 keeps all), not {self.top_k}"),
                (not 0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}"),
                (not 0 <= self.min_p <= 1, f"min_p must be in [0, 1], not {self.min_p}"),
            )
            if bad
        ]
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to make.

    Attributes:
        prompt: token ids. To continue a partial completion, append its tokens here.
        request_id: names the request for `RolloutEngine.abort`; unique among unfinished ones.
        group: requests with the same group share a prompt; an engine may prefill it once.
        priority: lower runs earlier where an engine supports it.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    request_id: str = ""
    group: int | None = None
    priority: int = 0


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
        tokens: generated ids, the ending token included.
        logprobs: one per token, empty if not asked for; see `SamplingParams.logprobs`.
        finish_reason: "stop" (end of sequence, stop string or token), "length" (max_tokens or the engine's
            ``max_model_len``), "abort" (tokens so far are returned).
        versions: ``(version, count)`` spans over ``tokens`` in order: which weights made which tokens.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    versions: list[tuple[int, int]] = field(default_factory=list)
    request_id: str = ""


class RolloutEngine(ABC):
    """Generates under weights of a known version.

    `generate` is awaited in event loops of several threads at the same time. The other methods are called from further
    threads, while requests are unfinished.
    """

    @property
    @abstractmethod
    def version(self) -> int:
        """Version given by the last `update_weights`; 0 before the first."""

    @property
    def shares_weights(self) -> bool:
        """True if the engine generates with the trainer's own tensors and needs no transfer."""
        return False

    @property
    def takes_adapters(self) -> bool:
        """True if the engine holds the frozen weights, and `update_weights` takes `TrainEngine.export_adapters`."""
        return False

    @property
    def dp_rank(self) -> int:
        """This process's data-parallel rank."""
        return 0

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""
        return 1

    @abstractmethod
    async def generate(self, request: GenerationRequest) -> Completion:
        """Make one completion. Any number of calls may be outstanding; the engine batches them.

        Raises:
            EngineError: the prompt is empty or leaves no room under ``max_model_len``.
        """

    @dispatch(Dispatch.SHARD)
    def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Make all completions and return them in the order of the requests."""

        done = 0

        async def one(request: GenerationRequest) -> Completion:
            nonlocal done
            completion = await self.generate(request)
            done += 1
            report("completions generated", done, len(requests))
            return completion

        async def gather() -> list[Completion]:
            return await asyncio.gather(*map(one, requests))

        return event_loop.run(gather())

    @abstractmethod
    @dispatch(Dispatch.BROADCAST)
    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Take over the weights in ``buckets`` (to the end of the stream) and call them ``version``.

        Cached prefixes of older weights are forgotten. Unfinished requests go on under the new weights; their
        completions tell which tokens each version made.
        """

    @abstractmethod
    @dispatch(Dispatch.BROADCAST)
    def pause(self) -> None:
        """Stop decoding until `resume`; unfinished requests keep their state, new ones wait."""

    @abstractmethod
    @dispatch(Dispatch.BROADCAST)
    def resume(self) -> None:
        """Go on after `pause`; idempotent."""

    @abstractmethod
    @dispatch(Dispatch.BROADCAST)
    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End unfinished requests (all by default); each returns what it has with finish reason "abort"."""

    @abstractmethod
    @dispatch(Dispatch.BROADCAST)
    def sleep(self) -> None:
        """Give device memory (cache, and weights if they are not shared) back; idempotent."""

    @abstractmethod
    @dispatch(Dispatch.BROADCAST)
    def wake(self) -> None:
        """Undo `sleep`; idempotent. `generate` does so itself."""

    @dispatch(Dispatch.BROADCAST)
    def close(self) -> None:
        """Release resources; the engine is not used afterwards."""
        return
