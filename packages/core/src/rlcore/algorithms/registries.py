"""The registries and what the functions in them take and return.

Shapes: ``T`` tokens of a packed batch, ``B`` sequences. All functions are pure and take their parameters (a `Config`)
as last positional argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from rlcore.batch import Batch
from rlcore.config import Config
from rlcore.metrics import Metrics
from rlcore.registry import Registry


@dataclass(frozen=True)
class Advantages:
    """``advantages`` ``[T]`` fp32, 0 where ``loss_mask`` is 0; ``returns`` ``[T]`` for a critic, or None."""

    advantages: torch.Tensor
    returns: torch.Tensor | None = None


class AdvantageEstimator(Protocol):
    """Reads ``loss_mask``, ``token_rewards`` (jagged fp32), ``group`` (dense int64) and what the entry ``needs``
    ("values" jagged; "baseline_score" dense fp32: the greedy rollout's score)."""

    def __call__(self, batch: Batch, params: Config, /) -> Advantages: ...


@dataclass(frozen=True)
class PolicyLossInputs:
    """All ``[T]`` fp32 but ``lengths`` ``[B]`` int64 (CPU). ``mask`` is 1 where a token is trained on."""

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor


class PolicyLoss(Protocol):
    """Per-token loss ``[T]`` (0 where masked) and metrics; the caller aggregates."""

    def __call__(self, inputs: PolicyLossInputs, params: Config, /) -> tuple[torch.Tensor, Metrics]: ...


class KLEstimator(Protocol):
    """Per-token estimate ``[T]`` of KL(π ‖ π_ref) from ``logprobs`` and ``ref_logprobs`` ``[T]``."""

    def __call__(self, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, params: Config, /) -> torch.Tensor: ...


class Aggregation(Protocol):
    """Per-token losses ``[T]`` to the micro-batch's share of the scalar loss.

    ``denominators`` are sums over the whole mini-batch: "tokens" (mask sum) and "sequences" (sequences with at least one
    trained token), so the shares add up to the same loss however the mini-batch is divided.
    """

    def __call__(
        self,
        losses: torch.Tensor,
        mask: torch.Tensor,
        lengths: torch.Tensor,
        denominators: Mapping[str, float],
        params: Config,
        /,
    ) -> torch.Tensor: ...


advantages: Registry[AdvantageEstimator] = Registry("advantage estimator")
policy_losses: Registry[PolicyLoss] = Registry("policy loss")
kl_estimators: Registry[KLEstimator] = Registry("KL estimator")
aggregations: Registry[Aggregation] = Registry("loss aggregation")
