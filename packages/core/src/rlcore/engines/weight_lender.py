"""`WeightLender`: a training engine whose weights a rollout engine in the same process can generate with."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class WeightLender(Protocol):
    """A `TrainEngine` that lends its weights within its process, so that no weights are transferred.

    A training engine satisfies this protocol by having `step_count` and `generation_weights`. It reaches the rollout
    engine as `RolloutSpec.train_engine`.
    """

    @property
    def dp_rank(self) -> int:
        """This process's data-parallel rank, as in `TrainEngine`."""
        ...

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks, as in `TrainEngine`."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the lent weights."""
        ...

    @property
    def step_count(self) -> int:
        """Number of changes of the weights: optimizer steps and loads. It is no weight version, see `docs/versions.md`.

        A rollout engine that derived something from the weights (fused copies, a KV cache) compares it before using
        that again.
        """
        ...

    def generation_weights(self) -> AbstractContextManager[nn.Module]:
        """Lend the policy: a causal language model of transformers with full parameters, in evaluation mode.

        Parameters are on `device` in compute dtype while the context lasts. The borrower may read the parameters and
        call the model and its modules; it must not change parameters nor keep them after leaving. The model's attention
        implementation may be one that only the engine can call: a borrower selects its implementation in the model's
        configuration for the duration of a call, and restores the engine's. `TrainEngine.forward`, `export_weights`,
        `save` and `save_pretrained` may be called while the context lasts. With ``dp_size > 1`` entering is a
        collective operation, leaving is not, and `TrainEngine.train` is called after leaving only.

        Raises:
            EngineError: on entering, if the engine's model is no policy (a value or score head).
        """
        ...
