"""From trajectories to a batch: one row per trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines.episode import PromptSample, Segment, Trajectory


def group_batch(sample: PromptSample, trajectories: Sequence[Trajectory]) -> Batch:
    """Return the trajectories of one sample as a batch.

    Per token: ``tokens`` int64, ``loss_mask`` fp32 (1 on sampled tokens), ``rollout_logprobs`` fp32 (0 on others; only
    if all sampled segments have them), ``token_version`` int32 (of the policy that sampled the token; -1 on others).
    Per row: ``group`` (the prompt's position in the data stream), ``prompt_length``, ``response_length``,
    ``policy_version`` (of the oldest sampled token), ``later_version_tokens`` (sampled by another version than the
    first one), all int64. Objects: ``finish_reason``, ``messages``, ``prompt_text`` (None for chat prompts),
    ``ground_truth``, ``data_source``, ``extra``.
    """
    rows = len(trajectories)
    segments = [segment for trajectory in trajectories for segment in trajectory.segments]
    sizes = torch.tensor([len(segment.tokens) for segment in segments], dtype=torch.int64)
    sampled = torch.tensor([segment.sampled for segment in segments], dtype=torch.bool).repeat_interleave(sizes)
    lengths = torch.tensor([sum(len(segment.tokens) for segment in t.segments) for t in trajectories])
    prompts = torch.tensor([_prompt_length(trajectory) for trajectory in trajectories])
    values = torch.tensor(list(chain.from_iterable(segment.tokens for segment in segments)), dtype=torch.int64)
    tokens = Jagged(values, lengths)
    made = [_versions(trajectory) for trajectory in trajectories]
    token_version = torch.full((len(values),), -1, dtype=torch.int32)
    token_version[sampled] = torch.cat(made)
    return Batch(
        {
            "tokens": tokens,
            "loss_mask": tokens.with_values(sampled.float()),
            **_logprobs(tokens, segments, sampled),
            "token_version": tokens.with_values(token_version),
            "group": torch.full((rows,), sample.position, dtype=torch.int64),
            "prompt_length": prompts,
            "response_length": lengths - prompts,
            "policy_version": torch.tensor([int(versions.min()) if len(versions) else 0 for versions in made]),
            "later_version_tokens": torch.tensor([int((versions != versions[:1]).sum()) for versions in made]),
            "finish_reason": [trajectory.finish_reason for trajectory in trajectories],
            "messages": [sample.messages] * rows,
            "prompt_text": [sample.text] * rows,
            "ground_truth": [sample.ground_truth] * rows,
            "data_source": [sample.data_source] * rows,
            "extra": [{**sample.extra, **t.info} if t.info else sample.extra for t in trajectories],
        }
    )


def _prompt_length(trajectory: Trajectory) -> int:
    """Return the number of tokens before the first sampled segment."""
    total = 0
    for segment in trajectory.segments:
        if segment.sampled:
            break
        total += len(segment.tokens)
    return total


def _logprobs(tokens: Jagged, segments: Sequence[Segment], sampled: torch.Tensor) -> dict[str, Jagged]:
    """Return the column ``rollout_logprobs``; no column if a sampled segment has no log-probs."""
    found = [segment.logprobs for segment in segments if segment.sampled]
    given = [logprobs for logprobs in found if logprobs is not None]
    if len(given) < len(found):
        return {}
    values = torch.zeros(len(tokens.values))
    values[sampled] = torch.tensor(list(chain.from_iterable(given)))
    return {"rollout_logprobs": tokens.with_values(values)}


def _versions(trajectory: Trajectory) -> torch.Tensor:
    """Return the version that made each sampled token, ``[sampled tokens]`` int32; 0 from an engine that says none."""
    sampled = [segment for segment in trajectory.segments if segment.sampled]
    spans = [span for segment in sampled for span in segment.versions or [(0, len(segment.tokens))]]
    versions, counts = (
        (torch.tensor(part, dtype=torch.int64) for part in zip(*spans)) if spans else ((torch.zeros(0),) * 2)
    )
    return versions.int().repeat_interleave(counts.long())


def completion_tokens(batch: Batch) -> list[list[int]]:
    """Return the token ids after the prompt of each row."""
    return [
        tokens[start:].tolist() for tokens, start in zip(batch["tokens"].to_list(), batch["prompt_length"].tolist())
    ]


def completion_texts(completions: Sequence[Sequence[int]], tokenizer: Any, ends: frozenset[int] | None) -> list[str]:
    """Return the completions as text.

    Args:
        ends: None leaves all special tokens out; otherwise they are kept, except one of ``ends`` as the last token.
    """
    if ends is None:
        return tokenizer.batch_decode(completions, skip_special_tokens=True)  # type: ignore[no-any-return]
    # shift allowed: without the end token
    bare = [tokens[:-1] if tokens and tokens[-1] in ends else tokens for tokens in completions]
    return tokenizer.batch_decode(bare, skip_special_tokens=False)  # type: ignore[no-any-return]
