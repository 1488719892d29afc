"""Rewards of the steps of a completion, from the scores of a process reward model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from rlcore.batch import Batch
from rlcore.engines import ModelSettings
from rlcore_recipes.data.steps import step_ends
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.settings.roles import StepRewardSettings

load_tokenizer_once = cache(load_tokenizer)

COMBINED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tokens": torch.sum,
    "sum": torch.sum,
    "mean": torch.mean,
    "min": torch.min,
    "product": torch.prod,
    "last": lambda rewards: rewards[-1],
}
"""From the rewards of the steps of a completion to its score."""


def scores_of_steps(batch: Batch, settings: StepRewardSettings, policy: ModelSettings) -> Batch:
    """Return ``reward_model_score`` (dense fp32), ``steps`` (dense fp32: their number) and, if every step is rewarded
    by itself, ``step_rewards`` (jagged fp32: at the last token of each step).

    The score of a completion without steps is 0.

    Args:
        batch: ``tokens``, ``loss_mask`` and the model's ``values``.
        policy: the model whose tokenizer made the tokens.
    """
    tokenizer = load_tokenizer_once(policy)
    rewards = torch.zeros(batch.total_tokens)
    scores, counts = torch.zeros(len(batch)), torch.zeros(len(batch))
    start = 0
    for row, (tokens, mask, values) in enumerate(zip(*(batch[name].to_list() for name in COLUMNS))):
        sampled = mask.nonzero().flatten()
        ends = sorted({*step_ends(tokens[sampled].tolist(), tokenizer, settings.separator)})
        places = sampled[ends]
        found = values[places].sigmoid() if settings.sigmoid else values[places]
        if ends:
            scores[row] = COMBINED[settings.combine](found)
        counts[row] = len(ends)
        rewards[start + places] = found
        start += len(tokens)
    columns = {"reward_model_score": scores, "steps": counts}
    return Batch(columns | ({"step_rewards": batch.jagged(rewards)} if settings.combine == "tokens" else {}))


COLUMNS = ("tokens", "loss_mask", "values")
