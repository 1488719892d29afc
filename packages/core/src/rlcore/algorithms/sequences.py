"""Sums, means and whitening over the sequences of a packed batch.

Every function takes flat per-token tensors ``[T]`` and ``lengths`` ``[B]`` int64 on the CPU, and never pads.
"""

from __future__ import annotations

import torch

from rlcore.batch import Batch
from rlcore.batch.alignment import predicted_mask
from rlcore.metrics import Metrics


def trained_mask(batch: Batch) -> torch.Tensor:
    """Return ``loss_mask`` without the first token of each sequence, which no state predicts: ``[T]`` bool."""
    return predicted_mask(batch.flat("loss_mask").bool(), batch.lengths)


def trained_counts(mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Trained tokens per sequence: ``[T]`` bool → ``[B]`` int64 on the CPU."""
    running = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
    edges = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return running[edges.to(mask.device)].diff().cpu()


def per_token(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Give each token its sequence's entry: ``[B]`` → ``[T]``."""
    return values.repeat_interleave(lengths.to(values.device), output_size=int(lengths.sum()))


def sequence_sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sum per sequence: ``[T]`` floating → ``[B]`` in the same dtype; differentiable and, unlike `index_add`,
    deterministic on CUDA."""
    return _sums(values, lengths).to(values.dtype)


def _sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the sums in fp64: summing one by one, bf16 stops at 256 and fp32 is off by 1e-3 over 131,072 tokens."""
    values = values.double()
    if len(lengths) == 0:
        return values[:0]
    # lengths are a batch's own: the check they would get (and the wait for the GPU it costs) is skipped
    return torch.segment_reduce(values, "sum", lengths=lengths.to(values.device), initial=0, unsafe=True)


def sequence_means(values: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each sequence where ``mask`` is 1: ``[T]`` → ``[B]``; 0 without such tokens."""
    sums = _sums(torch.where(mask.bool(), values, 0), lengths)
    return (sums / _sums(mask, lengths).clamp(min=1)).to(values.dtype)


def record_mean(metrics: Metrics, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
    """Record the mean of ``values`` ``[T]`` where ``mask`` is 1 with its weight, so that merged micro-batches give the
    mean over all their tokens."""
    count = mask.sum(dtype=torch.float64)
    metrics.mean(
        name, torch.where(mask.bool(), values.detach(), 0).sum(dtype=torch.float64) / count.clamp(min=1), count
    )


def whiten(values: torch.Tensor, epsilon: float = 1e-8) -> torch.Tensor:
    """``(x − mean) / sqrt(variance + epsilon)`` of ``values`` ``[N]``, with Bessel's correction; 0 for N = 1."""
    if len(values) == 0:
        return values
    # in fp64, so that equal values become 0 and not rounding noise divided by sqrt(epsilon)
    variance, mean = torch.var_mean(values.double(), correction=min(1, len(values) - 1))
    return ((values - mean) * (variance + epsilon).rsqrt()).to(values.dtype)
