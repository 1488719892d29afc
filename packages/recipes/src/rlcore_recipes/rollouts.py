"""From prompts to trajectories: one batch in which every row is a prompt with one completion."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines import Completion, GenerationRequest, RolloutEngine, SamplingParams
from rlcore_recipes.data.prompts import PromptSample
from rlcore_recipes.randomness import sample_seed
from rlcore_recipes.settings import RolloutSettings


def training_sampling(settings: RolloutSettings, max_tokens: int, stop_tokens: tuple[int, ...] = ()) -> SamplingParams:
    """How training samples.

    Args:
        stop_tokens: end a completion besides the model's end tokens.
    """
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        stop=tuple(settings.stop),
        stop_token_ids=stop_tokens,
    )


def validation_sampling(
    settings: RolloutSettings, max_tokens: int, stop_tokens: tuple[int, ...] = ()
) -> SamplingParams:
    """How validation samples; see `training_sampling`."""
    chosen = settings.validation
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=chosen.temperature,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        min_p=chosen.min_p,
        stop=tuple(settings.stop),
        stop_token_ids=stop_tokens,
        logprobs=False,
    )


def greedy(sampling: SamplingParams) -> SamplingParams:
    return replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=False)


@dataclass(frozen=True)
class SamplingJob:
    """What is asked of a rollout engine: ``n`` completions of one prompt.

    Attributes:
        seed: of the run; every completion has its own, derived from it, ``purpose`` and the prompt's position.
    """

    prompt: PromptSample
    sampling: SamplingParams
    n: int
    seed: int
    purpose: str = "train"

    @property
    def requests(self) -> list[GenerationRequest]:
        position = self.prompt.position
        return [
            GenerationRequest(
                prompt=self.prompt.prompt_tokens,
                sampling=replace(self.sampling, seed=sample_seed(self.seed, self.purpose, position, sample)),
                request_id=f"{self.purpose}-{position}-{sample}",
                group=position,
            )
            for sample in range(self.n)
        ]


def sample_together(engine: RolloutEngine, jobs: Sequence[SamplingJob]) -> Iterator[tuple[list[int], Batch]]:
    """All trajectories of ``jobs`` as one batch; with the places of the jobs. Nothing without jobs, which a rank has
    where there are fewer prompts than ranks; the engine is called even so."""
    completions = engine.generate_batch([request for job in jobs for request in job.requests])
    if jobs:
        prompts = [job.prompt for job in jobs]
        yield list(range(len(jobs))), trajectories(prompts, completions, jobs[0].n, jobs[0].sampling.logprobs)


def sample_as_completed(engine: RolloutEngine, jobs: Sequence[SamplingJob]) -> Iterator[tuple[list[int], Batch]]:
    """The trajectories of each job as soon as they are complete; with the place of the job."""
    loop = asyncio.new_event_loop()
    try:
        tasks = {loop.create_task(sample_one(engine, job)): place for place, job in enumerate(jobs)}
        waiting = set(tasks)
        while waiting:
            done, waiting = loop.run_until_complete(asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))
            for task in sorted(done, key=tasks.__getitem__):
                yield [tasks[task]], task.result()
    finally:
        loop.close()


async def sample_one(engine: RolloutEngine, job: SamplingJob) -> Batch:
    """The trajectories of one job."""
    completions = await asyncio.gather(*(engine.generate(request) for request in job.requests))
    return trajectories([job.prompt], completions, job.n, job.sampling.logprobs)


def generate(
    engine: RolloutEngine,
    prompts: Sequence[PromptSample],
    sampling: SamplingParams,
    n: int,
    seed: int,
    purpose: str = "train",
) -> Batch:
    """``n`` completions of each prompt, those of one prompt next to each other (see `trajectories`)."""
    jobs = [SamplingJob(prompt, sampling, n, seed, purpose) for prompt in prompts]
    requests = [request for job in jobs for request in job.requests]
    return trajectories(prompts, engine.generate_batch(requests), n, sampling.logprobs)


def trajectories(
    prompts: Sequence[PromptSample], completions: Sequence[Completion], n: int, logprobs: bool = True
) -> Batch:
    """Join each prompt with its ``n`` completions.

    Per token: ``tokens`` int64, ``loss_mask`` fp32 (1 on the completion), ``rollout_logprobs`` fp32 (0 on the prompt;
    only if ``logprobs`` were asked for and the engine gave them), ``token_version`` int32 (of the policy that made the
    token; -1 on the prompt).
    Per sample: ``group`` (the prompt's position in the data stream), ``prompt_length``, ``response_length``,
    ``policy_version`` (of the oldest token), ``later_version_tokens`` (made by another version than the first token),
    all int64. Objects: ``finish_reason``, ``messages``, ``ground_truth``, ``data_source``, ``extra``.
    """
    rows = [(prompt, completions[i * n + sample]) for i, prompt in enumerate(prompts) for sample in range(n)]
    tokens = Jagged.from_list([[*prompt.prompt_tokens, *completion.tokens] for prompt, completion in rows], torch.int64)
    prompt_length = torch.tensor([len(prompt.prompt_tokens) for prompt, _ in rows], dtype=torch.int64)
    loss_mask = completion_mask(tokens.lengths, prompt_length)
    sampled: dict[str, Jagged] = {}
    if logprobs and all(len(completion.logprobs) == len(completion.tokens) for _, completion in rows):
        values = torch.zeros(len(tokens.values))
        values[loss_mask.bool()] = torch.tensor([value for _, completion in rows for value in completion.logprobs])
        sampled["rollout_logprobs"] = tokens.with_values(values)
    versions = [token_versions(completion) for _, completion in rows]
    token_version = torch.full((len(tokens.values),), -1, dtype=torch.int32)
    token_version[loss_mask.bool()] = torch.cat([*versions, torch.zeros(0, dtype=torch.int32)])
    return Batch(
        {
            "tokens": tokens,
            "loss_mask": tokens.with_values(loss_mask),
            **sampled,
            "token_version": tokens.with_values(token_version),
            "group": torch.tensor([prompt.position for prompt, _ in rows], dtype=torch.int64),
            "prompt_length": prompt_length,
            "response_length": tokens.lengths - prompt_length,
            "policy_version": torch.tensor(
                [min((version for version, _ in completion.versions), default=0) for _, completion in rows],
                dtype=torch.int64,
            ),
            "later_version_tokens": torch.tensor(
                [int((made != made[:1]).sum()) for made in versions], dtype=torch.int64
            ),
            "finish_reason": [completion.finish_reason for _, completion in rows],
            "messages": [prompt.messages for prompt, _ in rows],
            "ground_truth": [prompt.ground_truth for prompt, _ in rows],
            "data_source": [prompt.data_source for prompt, _ in rows],
            "extra": [prompt.extra for prompt, _ in rows],
        }
    )


def token_versions(completion: Completion) -> torch.Tensor:
    """``[tokens]`` int32: the version that made each token; 0 from an engine that says none."""
    spans = completion.versions or [(0, len(completion.tokens))]
    versions, counts = (torch.tensor(part) for part in zip(*spans))
    return versions.int().repeat_interleave(counts)


def completion_mask(lengths: torch.Tensor, prompt_length: torch.Tensor) -> torch.Tensor:
    """``[T]`` fp32: 0 on the first ``prompt_length`` ``[B]`` tokens of each sequence, 1 on the rest."""
    starts = lengths.cumsum(0) - lengths
    positions = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    return (positions >= prompt_length.repeat_interleave(lengths)).float()


def completion_tokens(batch: Batch) -> list[list[int]]:
    """The generated token ids of each sample."""
    return [
        tokens[start:].tolist() for tokens, start in zip(batch["tokens"].to_list(), batch["prompt_length"].tolist())
    ]


def completion_texts(completions: Sequence[Sequence[int]], tokenizer: Any, ends: frozenset[int] | None) -> list[str]:
    """The completions as text.

    Args:
        ends: None leaves all special tokens out; else they are kept, but for one of ``ends`` as the last token.
    """
    if ends is None:
        return tokenizer.batch_decode(completions, skip_special_tokens=True)  # type: ignore[no-any-return]
    # shift allowed: without the end token
    bare = [tokens[:-1] if tokens and tokens[-1] in ends else tokens for tokens in completions]
    return tokenizer.batch_decode(bare, skip_special_tokens=False)  # type: ignore[no-any-return]
