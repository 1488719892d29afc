"""Preference pairs whose sides are scored at their last tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.algorithms.shaping import terminal_rewards
from rlcore.batch import Batch
from rlcore_recipes.data.preferences import PairDataset, load_pairs
from rlcore_recipes.data.settings import RewardDataSettings


@dataclass(frozen=True)
class ScoredPairs(PairDataset):
    """Preference pairs whose sides are scored."""

    def take(self, indices: Iterable[int]) -> Batch:
        """Return pairs as `PairDataset.take` does, with ``loss_mask`` 1 on the last token of each side alone.

        That token ends the answer, as the last token of a completion does, so that a policy's completions are scored as
        the answers were.
        """
        batch = super().take(indices)
        return batch.with_columns(loss_mask=batch.jagged(terminal_rewards(batch, torch.ones(len(batch)))))


def load_scored_pairs(
    settings: RewardDataSettings,
    files: Sequence[str],
    tokenizer: Any,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> ScoredPairs:
    """Read and tokenise preference pairs; the arguments are those of `load_pairs`.

    Raises:
        DataError: see `load_pairs`.
    """
    return ScoredPairs(**vars(load_pairs(settings, files, tokenizer, limit, vocabulary)))
