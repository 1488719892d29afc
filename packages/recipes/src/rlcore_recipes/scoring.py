"""From trajectories to rewards."""

from __future__ import annotations

from typing import Any

import torch

from rlcore.batch import Batch
from rlcore.engines import Reward, RewardResult, RewardSample
from rlcore_recipes.processes import on_rank_zero
from rlcore_recipes.rollouts import completion_texts


def reward_samples(batch: Batch, texts: list[str]) -> list[RewardSample]:
    return [
        RewardSample(
            prompt=messages,
            completion=text,
            ground_truth=truth,
            data_source=source,
            extra=extra,
            finish_reason=reason,
        )
        for messages, text, truth, source, extra, reason in zip(
            batch["messages"],
            texts,
            batch["ground_truth"],
            batch["data_source"],
            batch["extra"],
            batch["finish_reason"],
        )
    ]


def score(reward: Reward, tokenizer: Any, batch: Batch) -> Batch:
    """Add ``score`` (dense fp32), ``reward_result`` (objects) and ``completion`` (objects: the text).

    Rewards run once, not on every rank: they may be slow, metered or random.
    """
    texts = completion_texts(batch, tokenizer)
    results: list[RewardResult] = on_rank_zero(lambda: reward.score_batch(reward_samples(batch, texts)))
    scores = torch.tensor([result.score for result in results], dtype=torch.float32)
    return batch.with_columns(score=scores, reward_result=results, completion=texts)
