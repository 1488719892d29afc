"""`WeightBucket`: the unit in which weights are sent from a training engine to a rollout engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightBucket:
    """Some full tensors under their Hugging Face names, on the sender's device."""

    tensors: tuple[tuple[str, torch.Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for _, tensor in self.tensors)
