"""Noise on the embeddings of training samples: NEFTune (Jain et al., 2023, arXiv:2310.05914)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def embedding_noise(
    lengths: Sequence[int], seeds: Sequence[int], width: int, alpha: float, device: torch.device
) -> torch.Tensor:
    """Return noise ``[T, width]`` fp32 for packed samples: uniform in ±alpha / √(length · width).

    The noise of a sample depends on its seed and length alone, not on the micro-batch or the rank that it is on.
    """
    parts = []
    for length, seed in zip(lengths, seeds, strict=True):
        generator = torch.Generator(device).manual_seed(seed)
        uniform = torch.rand(length, width, generator=generator, device=device)
        parts.append((2 * uniform - 1) * (alpha / math.sqrt(length * width)))
    return torch.cat(parts)
