"""Episodes: how one trajectory of a sample comes about, and what it consists of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlcore.engines import Completion, GenerationRequest, RolloutEngine, SamplingParams
from rlcore.engines.rollout import FinishReason
from rlcore_recipes.data.prompts import PromptSample


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one origin.

    Attributes:
        tokens: token ids.
        sampled: True for tokens that the policy sampled, which are trained on; False for those of the prompt, of tools
            and of users.
        logprobs: of sampled tokens, one per token; None if the engine was not asked for them or gave none.
        versions: of sampled tokens, ``(version, count)`` spans in order: the policy that made them.
    """

    tokens: Sequence[int]
    sampled: bool = False
    logprobs: Sequence[float] | None = None
    versions: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Trajectory:
    """The result of an episode; it becomes one row of a batch.

    Attributes:
        segments: in the order of the sequence; the tokens before the first sampled segment are the prompt.
        finish_reason: of the last sampled segment; "given" for a completion of the data set.
        info: what the episode knows besides the tokens. Rewards and estimators find it among the sample's ``extra``.
    """

    segments: tuple[Segment, ...]
    finish_reason: FinishReason | Literal["given"]
    info: Mapping[str, Any] = field(default_factory=dict)


Episode = Callable[[RolloutEngine, PromptSample, int], Awaitable[Trajectory]]
"""``async (engine, sample, seed) → Trajectory``. It runs in a process of the rollout engine, many at a time; it must be
picklable (an importable function, or a `functools.partial` of one), and draw random numbers from ``seed`` alone."""


async def single_completion(
    engine: RolloutEngine, sample: PromptSample, seed: int, *, sampling: SamplingParams
) -> Trajectory:
    """Sample one completion of the prompt: the default episode."""
    request = GenerationRequest(
        prompt=sample.prompt_tokens,
        sampling=replace(sampling, seed=seed),
        request_id=f"{sample.position}-{seed}",
        group=sample.position,
    )
    completion = await engine.generate(request)
    return Trajectory(
        (Segment(sample.prompt_tokens), sampled_segment(completion, sampling.logprobs)), completion.finish_reason
    )


def sampled_segment(completion: Completion, logprobs: bool) -> Segment:
    """Return the tokens of ``completion``, with log-probs if ``logprobs`` were asked for and the engine gave them."""
    given = logprobs and len(completion.logprobs) == len(completion.tokens)
    return Segment(completion.tokens, True, completion.logprobs if given else None, completion.versions)
