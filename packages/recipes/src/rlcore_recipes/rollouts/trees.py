"""Trajectories of several rows: which rows belong together, and which tokens of a row are its own.

The rows of a trajectory are next to each other. A batch without the column ``trajectory`` has one row for each.
"""

from __future__ import annotations

from typing import Any

import torch

from rlcore.algorithms.sequences import sequence_sums
from rlcore.batch import Batch


def trajectory_index(batch: Batch) -> torch.Tensor:
    """Return the number of each row's trajectory in the batch, from 0 in the order of rows: ``[B]`` int64.

    Args:
        batch: may be held by reference.
    """
    if "trajectory" not in batch:
        return torch.arange(len(batch))
    ids = batch["trajectory"]
    return torch.unique_consecutive(ids, return_inverse=True)[1]


def first_rows(batch: Batch) -> torch.Tensor:
    """Return which rows are the first of their trajectory, ``[B]`` bool; ``batch`` may be held by reference."""
    return torch.diff(trajectory_index(batch), prepend=torch.tensor([-1])) > 0


def scored_rows(batch: Any) -> torch.Tensor:
    """Return which rows are the first of a valid trajectory, ``[B]`` bool; ``batch`` may be held by reference."""
    first = first_rows(batch)
    return first & batch["valid"] if "valid" in batch else first


def turn_rewards(batch: Batch) -> torch.Tensor:
    """Return the sum of the rewards of each trajectory's turns, ``[trajectories]`` fp32."""
    index = trajectory_index(batch)
    sums = torch.zeros(int(index.max()) + 1 if len(index) else 0)
    if "step_rewards" in batch:
        sums.index_add_(0, index, sequence_sums(batch.flat("step_rewards"), batch.lengths))
    return sums


def own_tokens(batch: Batch) -> torch.Tensor:
    """Return which tokens no earlier row of the trajectory has, ``[T]`` bool."""
    if "shared_prefix" not in batch:
        return torch.ones(batch.total_tokens, dtype=torch.bool)
    return token_places(batch.lengths) >= batch["shared_prefix"].repeat_interleave(batch.lengths)


def token_places(lengths: torch.Tensor) -> torch.Tensor:
    """Return the place of every token in its sequence, from 0: ``[B]`` → ``[T]`` int64."""
    return torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
