"""Episodes without sampling: completions that the data set gives, among those of the policy."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

from rlcore.engines import RolloutEngine, SamplingParams
from rlcore.engines.episode import PromptSample, Segment, Trajectory
from rlcore_recipes.rollouts.episode import single_completion
from rlcore_recipes.run.seeds import sample_seed

GIVEN_REASON: Literal["given"] = "given"
"""The ``finish_reason`` of a completion that the data set gives."""


async def given_or_sampled(
    engine: RolloutEngine, sample: PromptSample, seed: int, *, sampling: SamplingParams, fraction: float, run_seed: int
) -> Trajectory:
    """Sample a completion of a share ``fraction`` of all prompts; take that of the data set for the others.

    Which prompts these are is a function of ``run_seed`` and the sample's position, the same for all completions of a
    prompt. Sampled completions have no log-probs, because given ones have none and both are in one batch.
    """
    if random.Random(f"given {run_seed} {sample.position}").random() < fraction:
        return await single_completion(engine, sample, seed, sampling=replace(sampling, logprobs=False))
    return _given(sample)


async def given_first(
    engine: RolloutEngine, sample: PromptSample, seed: int, *, sampling: SamplingParams, run_seed: int
) -> Trajectory:
    """Take the completion of the data set for the first of a prompt's completions; sample the others, without
    log-probs."""
    if seed == sample_seed(run_seed, "train", sample.position, 0):
        return _given(sample)
    return await single_completion(engine, sample, seed, sampling=replace(sampling, logprobs=False))


def _given(sample: PromptSample) -> Trajectory:
    assert sample.completion is not None
    return Trajectory((Segment(sample.prompt_tokens), Segment(sample.completion, True)), GIVEN_REASON)
