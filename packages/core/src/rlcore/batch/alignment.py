"""The one place where tokens and predictions are shifted against each other.

Rule: entry *t* of every per-token column speaks of ``tokens[t]`` given ``tokens[:t]``. A causal model's hidden state at
position *t* predicts token *t + 1*, so the entry for position *p* is computed from the hidden state at *p - 1*. The first
token of a sequence is predicted by nothing: its entries are 0.
"""

import torch


def predicted_positions(lengths: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Flat positions of the tokens that a packed forward pass predicts.

    Args:
        lengths: ``[B]`` int64, tokens per sequence; the packed row holds the sequences one after another.
        mask: optional ``[T]``; only positions where it is non-zero are returned.

    Returns:
        ``[P]`` int64, ascending positions *p* on ``mask``'s device (CPU without one). The first position of every
        sequence is never among them. The hidden state that predicts ``tokens[p]`` stands at ``p - 1``.
    """
    total = int(lengths.sum())
    wanted = torch.ones(total, dtype=torch.bool) if mask is None else mask.bool().clone()
    starts = lengths.cumsum(0) - lengths
    wanted[starts[lengths > 0].to(wanted.device)] = False
    return wanted.nonzero().squeeze(-1)
