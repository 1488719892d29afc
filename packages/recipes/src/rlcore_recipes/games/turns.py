"""The players of the tokens of a game in which the policy makes every move."""

from __future__ import annotations

import torch

from rlcore.algorithms.sequences import per_token
from rlcore.batch import Batch


def players(batch: Batch) -> torch.Tensor:
    """Return 0 on the first player's tokens and 1 on the second's ``[T]`` int64; states have any.

    Sampled tokens without others between them are one turn, and players take turns.
    """
    sampled = batch.flat("loss_mask").bool().long()
    begins = torch.diff(sampled, prepend=sampled.new_zeros(1)) > 0
    first = (batch.lengths.cumsum(0) - batch.lengths)[batch.lengths > 0]
    begins[first] = sampled[first].bool()  # whatever the sequence before it ends with
    turns = begins.long().cumsum(0)
    earlier = torch.cat([turns.new_zeros(1), turns])[batch.lengths.cumsum(0) - batch.lengths]
    return (turns - per_token(earlier, batch.lengths) - 1) % 2
