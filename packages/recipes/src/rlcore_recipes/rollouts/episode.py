"""The default episode, and what an episode is to this package."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from rlcore.engines import GenerationRequest, RolloutEngine, SamplingParams
from rlcore.engines.episode import PromptSample, Segment, Trajectory, sampled_segment

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
