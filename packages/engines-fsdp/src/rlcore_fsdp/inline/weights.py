"""What the inline rollout needs from a training engine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel


@runtime_checkable
class WeightSource(Protocol):
    """A training engine in this process whose weights can be generated with."""

    @property
    def dp_rank(self) -> int: ...

    @property
    def dp_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def step_count(self) -> int:
        """Grows whenever the weights change."""
        ...

    def generation_weights(self) -> AbstractContextManager[PreTrainedModel]:
        """The model with whole parameters in compute dtype, in evaluation mode, while the context lasts.

        With ``dp_size > 1`` entering is a collective operation, leaving is not.
        """
        ...
