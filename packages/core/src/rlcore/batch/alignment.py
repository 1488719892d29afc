"""The token shift: which hidden state the entry of a token is computed from. Nothing else in rlcore shifts tokens.

**Rule for predictions** (log-probs, entropies, the values of a critic). Entry *t* of a per-token column describes
``tokens[t]`` given ``tokens[:t]``. The hidden state at position *t* has seen ``tokens[:t + 1]``, so the entry of
``tokens[t]`` is computed from the state at *t - 1*. A critic's entry *t* is thus the value of the state *before*
``tokens[t]`` is sampled. No state precedes the first token of a sequence: its entry is 0.

**Rule for scores** (a score head: reward models). Entry *t* rates the sequence up to and including ``tokens[t]``, so it
is computed from the state at *t*, without a shift. The score of the whole sequence is the entry of its last token.

Example: the sequences ``[5, 7, 9]`` and ``[4, 2]`` in one packed row, of which the model sampled 7, 9 and 2.

    position     0  1  2 | 3  4
    token        5  7  9 | 4  2
    loss_mask    0  1  1 | 0  1

>>> lengths, mask = torch.tensor([3, 2]), torch.tensor([0, 1, 1, 0, 1])
>>> positions = token_positions(lengths, mask)  # tokens 7, 9 and 2
>>> positions
tensor([1, 2, 4])
>>> state_positions(positions)  # log p(7 | 5) comes from the state at 0, log p(9 | 5, 7) from that at 1
tensor([0, 1, 3])
>>> to_column(torch.tensor([0.7, 0.9, 0.2]), positions, total=5)
tensor([0.0000, 0.7000, 0.9000, 0.0000, 0.2000])

Without a mask every token has an entry but the first of each sequence, with any head. A score head computes the
entries from the states at the same positions:

>>> token_positions(lengths)
tensor([1, 2, 4])
>>> state_positions(token_positions(lengths, head="score"), head="score")
tensor([1, 2, 4])
>>> token_positions(lengths, torch.tensor([1, 0, 1, 0, 1]), head="score")  # the mask may include first tokens
tensor([0, 2, 4])
"""

from __future__ import annotations

from typing import Literal

import torch

from rlcore.errors import BatchError

_SHIFT = {"policy": 1, "value": 1, "score": 0}
"""Positions from the state of an entry to the entry's token, by the head of the model."""


def token_positions(
    lengths: torch.Tensor, mask: torch.Tensor | None = None, *, head: Literal["policy", "value", "score"] = "policy"
) -> torch.Tensor:
    """Return the flat positions of the tokens that get an entry from a packed forward pass.

    Args:
        lengths: ``[B]`` int64, tokens per sequence (0 is allowed); the packed row holds one sequence after another.
        mask: ``[T]``; only tokens where it is not 0 get an entry. None: all but the first of each sequence.
        head: head of the model; unless it is a score head, the first token of a sequence has no entry in any case.

    Returns:
        ``[P]`` int64, ascending, on ``mask``'s device (CPU without one).

    Raises:
        BatchError: ``mask`` does not have one entry per token.
    """
    total = int(lengths.sum())
    if mask is not None and mask.shape != (total,):
        raise BatchError(f"the mask has shape {list(mask.shape)} but the sequences have {total} tokens")
    wanted = torch.ones(total, dtype=torch.bool) if mask is None else mask != 0
    if _SHIFT[head] or mask is None:
        wanted = predicted_mask(wanted, lengths)
    return wanted.nonzero().squeeze(-1)


def state_positions(positions: torch.Tensor, *, head: Literal["policy", "value", "score"] = "policy") -> torch.Tensor:
    """Return the positions ``[P]`` of the hidden states from which the entries at ``positions`` are computed."""
    return positions - _SHIFT[head]


def to_column(entries: torch.Tensor, positions: torch.Tensor, total: int) -> torch.Tensor:
    """Put ``entries`` ``[P, ...]`` into a column ``[total, ...]`` that is 0 but at ``positions``; differentiable."""
    return entries.new_zeros(total, *entries.shape[1:]).index_copy(0, positions, entries)


def predicted_mask(mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``mask`` ``[T]`` that is 0 at the first token of each sequence, which no state predicts."""
    mask = mask.clone()
    starts = (lengths.cumsum(0) - lengths)[lengths > 0]  # the start of an empty sequence at the end would be T
    mask[starts.to(mask.device)] = 0
    return mask


def next_entries(entries: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the entry of the following token of the same sequence: ``[T]`` → ``[T]``, 0 at the last token.

    This is a step in time (V(s_{t+1}) for V(s_t)), not the shift between states and tokens.
    """
    following = torch.cat([entries[1:], entries.new_zeros(1)])[: len(entries)]
    following[_last_positions(lengths[lengths > 0]).to(entries.device)] = 0
    return following


def last_entries(entries: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the entry of the last token of each sequence, none of which is empty: ``[T]`` → ``[B]``."""
    return entries[_last_positions(lengths).to(entries.device)]


def _last_positions(lengths: torch.Tensor) -> torch.Tensor:
    return lengths.cumsum(0) - 1
