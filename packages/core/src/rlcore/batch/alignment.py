"""The one place where tokens and predictions are shifted against each other.

Rule: entry *t* of every per-token column speaks of ``tokens[t]`` given ``tokens[:t]``. A causal model's hidden state
at position *t* predicts token *t + 1*, so the entry for position *p* is computed from the hidden state at *p - 1*. The
first token of a sequence is predicted by nothing: its entries are 0.

An engine asks for the positions (`predicted_positions`), takes the hidden states that predict them
(`predicting_states`), computes one value each, and puts the values where they belong (`scatter_predictions`).
"""

import torch

from rlcore.errors import BatchError


def predicted_positions(lengths: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Flat positions of the tokens that a packed forward pass predicts.

    Args:
        lengths: ``[B]`` int64, tokens per sequence (0 is allowed); the packed row holds one sequence after another.
        mask: optional ``[T]``; only positions where it is non-zero are returned.

    Returns:
        ``[P]`` int64, ascending positions *p* on ``mask``'s device (CPU without one). The first position of every
        sequence is never among them. The hidden state that predicts ``tokens[p]`` stands at ``p - 1``.

    Raises:
        BatchError: ``mask`` does not have one entry per token.
    """
    total = int(lengths.sum())
    if mask is not None and mask.shape != (total,):
        raise BatchError(f"the mask has shape {list(mask.shape)} but the sequences have {total} tokens")
    wanted = torch.ones(total, dtype=torch.bool) if mask is None else mask != 0
    starts = lengths.cumsum(0) - lengths
    wanted[starts[lengths > 0].to(wanted.device)] = False  # the start of a trailing empty sequence would be T
    return wanted.nonzero().squeeze(-1)


def predicting_states(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Those of the hidden states ``[T, ...]`` that predict the tokens at ``positions`` ``[P]``: ``[P, ...]``."""
    return states.index_select(0, positions - 1)


def scatter_predictions(values: torch.Tensor, positions: torch.Tensor, total: int) -> torch.Tensor:
    """A column ``[total, ...]`` of ``values`` ``[P, ...]`` at ``positions`` ``[P]`` and 0 elsewhere; differentiable."""
    return values.new_zeros(total, *values.shape[1:]).index_copy(0, positions, values)
