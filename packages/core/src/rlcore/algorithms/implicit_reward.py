"""Implicit process rewards: a language model whose log-ratio to a reference is the reward of each token.

With a language model π_φ as reward model, token *t* has the reward r_t = β · (log π_φ − log π_ref). Their sum over an
answer is trained to be the log-odds of the answer being right, so that labels of whole answers give rewards of tokens.

Source: PRIME, Cui et al. 2025, arXiv:2502.01456; implicit process rewards: Yuan et al. 2024, arXiv:2412.01981.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field

from rlcore.algorithms.discounted import discounted_suffix_sums
from rlcore.algorithms.group_relative import rloo
from rlcore.algorithms.registries import Advantages, advantages
from rlcore.algorithms.sequences import per_token, sequence_sums, trained_counts, trained_mask, whiten
from rlcore.batch import Batch
from rlcore.config import Config
from rlcore.config.registry import NoParams
from rlcore.engines.train import ForwardRequest
from rlcore.metrics import Metrics

EPSILON = 1e-6


class PRIMEParams(Config):
    """Parameters of ``prime``."""

    process_coeff: float = Field(5.0, ge=0, description="Weight of the process rewards.")
    outcome_coeff: float = Field(5.0, ge=0, description="Weight of the score.")
    gamma: float = Field(1.0, ge=0, le=1, description="Discount of later process rewards.")
    normalize: bool = Field(
        True, description="Divide process rewards by the largest reward to go of the batch, so that all are within ±1."
    )
    whiten: bool = Field(True, description="Whiten the advantages over the batch.")


@advantages.register("prime", params=PRIMEParams, required_columns={"process_rewards"}, traits={"compares_group"})
def prime(batch: Batch, params: PRIMEParams) -> Advantages:
    """c_p · Σ_k γᵏ (r_{t+k} − b) + c_o · (s − mean of the other scores), b = mean over the other answers' mean r.

    Source: PRIME, Cui et al. 2025, arXiv:2502.01456 (eq. 5); the scale of process rewards: its implementation.
    """
    mask = trained_mask(batch)
    counts = trained_counts(mask, batch.lengths)
    rewards = batch.flat("process_rewards")[mask].double()
    if params.normalize and len(rewards):
        rewards = rewards / (discounted_suffix_sums(rewards, counts, 1.0).abs().max() + EPSILON)
    means = sequence_sums(rewards, counts) / counts.clamp(min=1).to(rewards.device)
    baseline = _mean_of_others(means, batch["group"].to(rewards.device))
    togo = discounted_suffix_sums(rewards - per_token(baseline, counts), counts, params.gamma)
    result = torch.zeros(len(mask), dtype=torch.float64, device=rewards.device)
    result[mask] = params.process_coeff * togo
    result += params.outcome_coeff * rloo(batch, NoParams()).advantages
    if params.whiten:
        result[mask] = whiten(result[mask])
    return Advantages(result.float())


def _mean_of_others(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return the mean over the other samples of each sample's group, ``[B]``; without others the sample's own value."""
    _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
    sums = torch.zeros_like(values).index_add_(0, index, values)[index]
    others = counts[index] - 1
    return torch.where(others > 0, (sums - values) / others.clamp(min=1), values)


@dataclass(frozen=True)
class ImplicitRewardObjective:
    """Cross-entropy of σ(Σ_t β (log π_φ − log π_ref)) with the label of the answer, averaged over answers.

    Reads ``loss_mask``, ``ref_logprobs`` and ``outcome`` (dense fp32: 1 for a right answer, 0 for a wrong one).

    Metrics: ``loss``; ``accuracy``, the share of answers on whose side of 0 the sum is.
    """

    beta: float
    temperature: float = 1.0

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("logprobs",), self.temperature)

    def denominators(self, batch: Batch) -> dict[str, float]:
        return {"sequences": float(len(batch))}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        rewards = implicit_rewards(batch, outputs["logprobs"], self.beta)
        odds = sequence_sums(rewards.double(), batch.lengths)
        outcome = batch["outcome"].to(odds)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(odds, outcome, reduction="none")
        metrics = Metrics()
        if len(batch):
            metrics.mean("loss", losses.detach().mean(), len(batch))
            metrics.mean("accuracy", ((odds > 0) == (outcome > 0.5)).double().mean(), len(batch))
        return losses.sum() / max(denominators["sequences"], 1.0), metrics


def implicit_rewards(batch: Batch, logprobs: torch.Tensor, beta: float) -> torch.Tensor:
    """Return β (log π_φ − log π_ref) of each token, ``[T]``; 0 where it is not trained on.

    Args:
        batch: with ``loss_mask`` and ``ref_logprobs``.
        logprobs: ``[T]``, under π_φ.
    """
    return torch.where(trained_mask(batch), beta * (logprobs - batch.flat("ref_logprobs")), 0)


def pair_accuracy(rewards: torch.Tensor, outcome: torch.Tensor, group: torch.Tensor) -> tuple[float, int]:
    """Return how many pairs of a right and a wrong answer to a prompt ``rewards`` ``[B]`` order correctly, as a share
    (equal rewards count half), and the number of those pairs."""
    right, pairs, ordered = outcome > 0.5, 0, 0.0
    for number in torch.unique(group):
        mates = group == number
        ahead = rewards[mates & right][:, None] - rewards[mates & ~right][None]
        pairs += ahead.numel()
        ordered += float((ahead.sign() + 1).sum()) / 2
    return ordered / max(pairs, 1), pairs
