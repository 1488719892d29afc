"""KL divergence to a reference policy: per-token estimators, the penalty in the reward, and its controllers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field

from rlcore.algorithms.bounds import LOG_RATIO_LIMIT, bounded
from rlcore.algorithms.registries import KLEstimator, kl_estimators
from rlcore.algorithms.sequences import sequence_means, trained_mask
from rlcore.batch import Batch
from rlcore.config import Algorithm, AlgorithmField, Config
from rlcore.config.registry import NoParams
from rlcore.metrics import Metrics

K3_LIMIT = 10.0
K3_LOG_RATIO_LIMIT = 2.6109  # just above where k3 reaches its limit; the gradient is nowhere steeper than there


@kl_estimators.register("k1")
def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, params: NoParams) -> torch.Tensor:
    """logπ − logπ_ref: unbiased, can be negative; as a loss its expected gradient is zero.

    Source: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
    """
    return logprobs - ref_logprobs


@kl_estimators.register("abs")
def absolute(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, params: NoParams) -> torch.Tensor:
    """``|logπ − logπ_ref|``: a distance rather than a KL, never negative.

    Source: TRL's PPO (``kl_penalty="abs"``), after Ziegler et al. 2019, arXiv:1909.08593.
    """
    return (logprobs - ref_logprobs).abs()


@kl_estimators.register("k2")
def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, params: NoParams) -> torch.Tensor:
    """½(logπ − logπ_ref)²: biased but never negative; its gradient is an unbiased one of the KL for on-policy samples.

    Source: Schulman 2020, "Approximating KL divergence"; gradient: Tang & Munos 2025, arXiv:2506.09477.
    """
    return (logprobs - ref_logprobs).square() / 2


@kl_estimators.register("k3")
def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, params: NoParams) -> torch.Tensor:
    """eˣ − x − 1 with x = logπ_ref − logπ: unbiased, never negative, low variance, at most 10.

    Beyond that the gradient goes on: 1 − eˣ, and for large x that of x = 2.61, which is −12.6.

    Source: Schulman 2020, "Approximating KL divergence"; as a loss: GRPO, Shao et al. 2024, arXiv:2402.03300.
    """
    difference = bounded(ref_logprobs - logprobs, -LOG_RATIO_LIMIT, K3_LOG_RATIO_LIMIT)
    return bounded(difference.expm1() - difference, 0, K3_LIMIT)  # expm1: eˣ − 1 − x rounds below 0 near x = 0


@kl_estimators.register("k1+")
def k1_straight_through(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, params: NoParams) -> torch.Tensor:
    """Return the value of k1 with the gradient of k2, for use as a loss.

    Source: Tang & Munos 2025, arXiv:2506.09477.
    """
    return _with_k2_gradient(k1, logprobs, ref_logprobs)


@kl_estimators.register("k3+")
def k3_straight_through(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, params: NoParams) -> torch.Tensor:
    """Return the value of k3 with the gradient of k2, for use as a loss.

    Source: Tang & Munos 2025, arXiv:2506.09477.
    """
    return _with_k2_gradient(k3, logprobs, ref_logprobs)


def _with_k2_gradient(value: KLEstimator, logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    gradient = k2(logprobs, ref_logprobs, NoParams())
    return value(logprobs.detach(), ref_logprobs, NoParams()) + (gradient - gradient.detach())


# --- the penalty in the reward --------------------------------------------------------------------------------------


class KLPenaltySettings(Config):
    """KL to the reference policy, subtracted from the token rewards."""

    coeff: float = Field(0.001, ge=0, description="β; the first one if `target` is set.")
    estimator: Annotated[Algorithm, AlgorithmField(kl_estimators)] = Field(  # type: ignore[assignment]
        "k1", description="KL estimator."
    )
    target: float | None = Field(None, gt=0, description="KL that β is adapted to reach; null keeps β.")
    horizon: int = Field(10000, gt=0, description="Samples over which β adapts; used with `target` only.")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.target is not None and self.coeff == 0:
            yield (
                "coeff",
                f"is 0 and would stay 0, as it is multiplied to reach target={self.target}; set a positive start value",
            )


class KLController(Protocol):
    """Adapts β, the coefficient of the KL penalty, between steps."""

    coeff: float

    def update(self, kl: float, samples: int) -> None:
        """Adapt to the ``kl`` measured over ``samples`` new samples."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint holds."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class FixedKL(KLController):
    """Keeps β constant."""

    def __init__(self, coeff: float) -> None:
        self.coeff = coeff

    def update(self, kl: float, samples: int) -> None:
        return

    def state_dict(self) -> dict[str, Any]:
        return {"coeff": self.coeff}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coeff = state["coeff"]


class AdaptiveKL(FixedKL):
    """β ×= 1 + clip(KL / target − 1, ±0.2) · samples / horizon (Ziegler et al. 2019, arXiv:1909.08593, §2.2).

    At most ``horizon`` samples count: β changes by 20 % at most and keeps its sign. A batch whose KL is
    not finite does not change it.
    """

    def __init__(self, coeff: float, target: float, horizon: int) -> None:
        super().__init__(coeff)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coeff *= 1 + error * min(samples / self.horizon, 1.0)


def kl_controller(settings: KLPenaltySettings) -> KLController:
    """Return the controller that ``settings`` describe."""
    if settings.target is None:
        return FixedKL(settings.coeff)
    return AdaptiveKL(settings.coeff, settings.target, settings.horizon)


def apply_kl_penalty(batch: Batch, estimator: Algorithm, controller: KLController) -> tuple[Batch, Metrics]:
    """Subtract β·KL from the token rewards, then let the controller adapt β for the next batch.

    Args:
        batch: the whole training batch, with ``loss_mask``, ``token_rewards``, ``old_logprobs`` and ``ref_logprobs``.

    Returns:
        the batch with its new ``token_rewards``, and ``reward_kl_penalty`` (mean over sequences of the mean over
        tokens, which is also what the controller sees) and ``reward_kl_penalty_coeff`` (the β that was applied).
    """
    mask = trained_mask(batch)
    kl = estimator(batch.flat("old_logprobs"), batch.flat("ref_logprobs"))
    kl = torch.where(mask, kl, 0)
    rewards = batch.flat("token_rewards") - controller.coeff * kl
    measured = float(sequence_means(kl, mask, batch.lengths).mean()) if len(batch) else 0.0
    metrics = Metrics()
    metrics.mean("reward_kl_penalty", measured)
    metrics.mean("reward_kl_penalty_coeff", controller.coeff)
    controller.update(measured, len(batch))
    return batch.with_columns(token_rewards=batch.jagged(rewards)), metrics
