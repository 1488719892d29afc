"""Trajectories of several rows: which rows belong together, and which tokens of a row are its own.

The rows of a trajectory are next to each other. A batch without the column ``trajectory`` has one row for each.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from rlcore.algorithms.sequences import sequence_sums, trained_counts, trained_mask
from rlcore.batch import Batch
from rlcore.batch.indexing import check_split, unit_ids


def trajectory_index(batch: Batch) -> torch.Tensor:
    """Return the number of each row's trajectory in the batch, from 0 in the order of rows: ``[B]`` int64.

    Args:
        batch: may be held by reference.
    """
    if "trajectory" not in batch:
        return torch.arange(len(batch))
    index: torch.Tensor = torch.unique_consecutive(batch["trajectory"], return_inverse=True)[1]
    return index


def first_rows(batch: Batch) -> torch.Tensor:
    """Return which rows are the first of their trajectory, ``[B]`` bool; ``batch`` may be held by reference."""
    return torch.diff(trajectory_index(batch), prepend=torch.tensor([-1])) > 0


def last_rows(batch: Batch) -> torch.Tensor:
    """Return which rows are the last of their trajectory, ``[B]`` bool; ``batch`` may be held by reference."""
    return torch.diff(trajectory_index(batch), append=torch.tensor([-1])) != 0


def scored_rows(batch: Any) -> torch.Tensor:
    """Return which rows are the first of a valid trajectory, ``[B]`` bool; ``batch`` may be held by reference."""
    first = first_rows(batch)
    return first & batch["valid"] if "valid" in batch else first


def one_per_trajectory(batch: Batch) -> Batch:
    """Return the first row of each valid trajectory; ``batch`` may be held by reference."""
    return batch.filter(scored_rows(batch)) if "trajectory" in batch else batch


def as_sequences(batch: Batch) -> Batch:
    """Return a batch with one sequence for each trajectory: its rows one after another, in the same order of tokens."""
    starts = first_rows(batch).nonzero().flatten()
    lengths = torch.zeros(len(starts), dtype=torch.int64).index_add_(0, trajectory_index(batch), batch.lengths)
    return batch.resequenced(lengths, starts)


def by_trajectories(batch: Batch, size: int, together: str | None = None) -> list[Batch]:
    """Return consecutive batches of ``size`` trajectories, as `Batch.split` does of samples.

    Raises:
        BatchError: samples of one unit of the column ``together`` would be in two of them.
    """
    index, first = trajectory_index(batch), first_rows(batch)
    starts = (first & (index % size == 0)).nonzero().flatten().tolist()
    parts = [batch.slice(start, end) for start, end in pairwise([*starts, len(batch)])]
    if together is not None:
        check_split(unit_ids(together, batch[together][first]), size, together)
    return parts


def turn_rewards(batch: Batch) -> torch.Tensor:
    """Return the sum of the rewards of each trajectory's turns, ``[trajectories]`` fp32."""
    if "step_rewards" not in batch:
        return torch.zeros(int(first_rows(batch).sum()))
    return trajectory_sums(batch, batch.flat("step_rewards"))


def trajectory_sums(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``values`` ``[T]`` over each trajectory, ``[trajectories]``; of tokens that several rows have
    it counts one."""
    sums = sequence_sums(torch.where(own_tokens(batch), values, 0), batch.lengths)
    totals = sums.new_zeros(int(first_rows(batch).sum()))
    return totals.index_add_(0, trajectory_index(batch), sums)


def longest_rows(batch: Batch) -> torch.Tensor:
    """Return the ``response_length`` of the longest row of each row's trajectory, ``[B]`` int64."""
    lengths, index = batch["response_length"], trajectory_index(batch)
    longest: torch.Tensor = lengths.clone().scatter_reduce_(0, index, lengths, "amax", include_self=False)
    return longest[index]


def trajectory_tokens(batch: Batch) -> torch.Tensor:
    """Return the trained tokens of each row's trajectory, ``[B]`` int64."""
    counts, index = trained_counts(trained_mask(batch), batch.lengths), trajectory_index(batch)
    return torch.zeros_like(counts).index_add_(0, index, counts)[index]


def first_tokens(batch: Batch) -> torch.Tensor:
    """Return for each token the place of the same token in the first row of the trajectory that has it, ``[T]`` int64.

    A row and the earlier one that it shares its first tokens with are recognised by these tokens.
    """
    places = torch.arange(batch.total_tokens)
    if "shared_prefix" not in batch:
        return places
    rows, starts = batch["tokens"].to_list(), (batch.lengths.cumsum(0) - batch.lengths).tolist()
    index, shared = trajectory_index(batch).tolist(), batch["shared_prefix"].tolist()
    begin = 0
    for row, (length, start) in enumerate(zip(shared, starts)):
        if row and index[row] != index[begin]:
            begin = row
        earlier = (r for r in range(begin, row) if torch.equal(rows[r][:length], rows[row][:length]))
        if length:
            source = starts[next(earlier)]
            places[start : start + length] = places[source : source + length]
    return places


def own_tokens(batch: Batch) -> torch.Tensor:
    """Return which tokens no earlier row of the trajectory has, ``[T]`` bool."""
    if "shared_prefix" not in batch:
        return torch.ones(batch.total_tokens, dtype=torch.bool)
    shared: torch.Tensor = batch["shared_prefix"].repeat_interleave(batch.lengths)
    return token_places(batch.lengths) >= shared


def token_places(lengths: torch.Tensor) -> torch.Tensor:
    """Return the place of every token in its sequence, from 0: ``[B]`` → ``[T]`` int64."""
    return torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
