"""The losses that training engines call: algorithms composed into `rlcore.engines.train.Objective`.

Normalisers are sums over the whole mini-batch, so value and gradient do not depend on micro-batches, ranks or packing
order. Metrics have no prefix; recipes add ``actor/`` or ``critic/``. Objectives are plain picklable data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field

from rlcore.algorithms.aggregation import TRAJECTORY_TOKENS, denominators, row_shares
from rlcore.algorithms.off_policy import mismatch_metrics
from rlcore.algorithms.registries import (
    PolicyLossInputs,
    aggregations,
    corrections,
    kl_estimators,
    policy_losses,
    value_losses,
)
from rlcore.algorithms.sequences import per_token, record_mean, trained_counts, trained_mask
from rlcore.batch import Batch
from rlcore.config import Algorithm, AlgorithmField, Config
from rlcore.config.registry import Entry
from rlcore.engines.train import ForwardRequest
from rlcore.metrics import Metrics

# Metrics that are the mini-batch's loss, or a part of it: means whose weights are the mini-batch's trained tokens.
LOSS_METRICS = ("loss", "pg_loss", "kl_loss")


class KLLossSettings(Config):
    """KL to the reference policy as a term of the loss."""

    coeff: float = Field(0.0, ge=0, description="Weight of the term; 0 needs no reference policy.")
    estimator: Annotated[Algorithm, AlgorithmField(kl_estimators)] = Field(  # type: ignore[assignment]
        "k3", description="KL estimator."
    )


class PolicyObjectiveSettings(Config):
    """The loss of the policy: policy gradient − entropy_coeff · entropy + kl_loss.coeff · KL."""

    policy_loss: Annotated[Algorithm, AlgorithmField(policy_losses)] = Field(  # type: ignore[assignment]
        "ppo", description="Policy-gradient loss."
    )
    aggregation: Annotated[Algorithm, AlgorithmField(aggregations)] = Field(  # type: ignore[assignment]
        "token-mean", description="How per-token losses become one number."
    )
    entropy_coeff: float = Field(0.0, description="Weight of the entropy bonus.")
    kl_loss: KLLossSettings = Field(default_factory=KLLossSettings, description="KL to the reference policy.")
    correction: Annotated[Algorithm, AlgorithmField(corrections)] | None = Field(
        None, description="Importance weights between the rollout's and the trainer's log-probs; null is off."
    )


@dataclass(frozen=True)
class PolicyObjective:
    """Policy gradient with entropy bonus and KL loss.

    Reads ``loss_mask`` and ``advantages``; the columns that the policy loss needs; ``ref_logprobs`` if the KL loss is
    on; ``rollout_logprobs`` if a correction is on (and, where present, to measure the mismatch); ``old_logprobs`` where
    present: without it the update is taken as on-policy, with the current log-probs, without gradient, as old ones.
    That saves a forward pass.

    Metrics: ``loss``, ``pg_loss``, ``entropy``, ``kl_loss`` (before its coefficient), those of the policy loss, the
    correction and the mismatch. The correction and the mismatch compare the rollout's log-probs with the old ones, or
    with the current ones (without gradient) where the old ones are the rollout's.

    Attributes:
        old_from_rollout: ``old_logprobs`` are those that the rollout engine reported.
    """

    settings: PolicyObjectiveSettings
    temperature: float = 1.0
    old_from_rollout: bool = False

    @property
    def request(self) -> ForwardRequest:
        together = self.settings.policy_loss.entry.together
        return ForwardRequest(("logprobs", "entropy"), self.temperature, together)

    def denominators(self, batch: Batch) -> dict[str, float]:
        return denominators(batch)

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        settings = self.settings
        terms = LossTerms(batch, denominators, settings.aggregation)
        logprobs = terms.trained(outputs["logprobs"])
        old_logprobs = terms.column("old_logprobs") if "old_logprobs" in batch else logprobs.detach()
        token_losses, metrics = settings.policy_loss(
            PolicyLossInputs(
                logprobs,
                old_logprobs,
                terms.column("advantages"),
                terms.mask,
                batch.lengths,
                terms.declared(settings.policy_loss.entry, outputs),
            )
        )
        if settings.correction is not None or "rollout_logprobs" in batch:
            rollout_logprobs = terms.column("rollout_logprobs")
            # the rollout's log-probs compared with themselves would show no mismatch, and weigh every sample 1
            trainers = logprobs.detach() if self.old_from_rollout else old_logprobs
            metrics.update(mismatch_metrics(rollout_logprobs, trainers, terms.mask))
            if settings.correction is not None:
                weights, measured = settings.correction(rollout_logprobs, trainers, terms.mask, batch.lengths)
                token_losses = token_losses * weights
                metrics.update(measured)
        loss = terms.add("pg_loss", token_losses, metrics)

        entropy = terms.trained(outputs["entropy"])
        record_mean(metrics, "entropy", entropy, terms.mask)
        if settings.entropy_coeff:
            loss = loss - settings.entropy_coeff * terms.aggregate(entropy)
        if settings.kl_loss.coeff:
            kl = settings.kl_loss.estimator(logprobs, terms.column("ref_logprobs"))
            loss = loss + settings.kl_loss.coeff * terms.add("kl_loss", kl, metrics)
        terms.record("loss", loss, metrics)
        return loss, metrics


class ValueObjectiveSettings(Config):
    """The loss of the critic."""

    value_loss: Annotated[Algorithm, AlgorithmField(value_losses)] = Field(  # type: ignore[assignment]
        "clipped", description="Loss per token."
    )
    aggregation: Annotated[Algorithm, AlgorithmField(aggregations)] = Field(  # type: ignore[assignment]
        "token-mean", description="How per-token losses become one number."
    )
    coeff: float = Field(1.0, gt=0, description="Weight of the loss.")


@dataclass(frozen=True)
class ValueObjective:
    """Regression of a critic on ``returns``; reads ``loss_mask``, ``returns`` and the ``values`` they were made with.

    Metrics: ``loss``, ``vf_loss`` (before ``coeff``) and those of the value loss.
    """

    settings: ValueObjectiveSettings

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("values",))

    def denominators(self, batch: Batch) -> dict[str, float]:
        return denominators(batch)

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        terms = LossTerms(batch, denominators, self.settings.aggregation)
        token_losses, metrics = self.settings.value_loss(
            terms.trained(outputs["values"]), terms.column("values"), terms.column("returns"), terms.mask
        )
        loss = self.settings.coeff * terms.add("vf_loss", token_losses, metrics)
        terms.record("loss", loss, metrics)
        return loss, metrics


class SFTObjectiveSettings(Config):
    """The loss of supervised fine-tuning."""

    aggregation: Annotated[Algorithm, AlgorithmField(aggregations)] = Field(  # type: ignore[assignment]
        "token-mean", description="How per-token losses become one number."
    )
    neftune_alpha: float = Field(
        0.0, ge=0, description="Noise on the embeddings of training samples (NEFTune); 5 to 15 are usual, 0 adds none."
    )


@dataclass(frozen=True)
class SFTObjective:
    """Negative log-likelihood of the tokens under ``loss_mask``. Metrics: ``loss``.

    With ``neftune_alpha`` a batch needs ``noise_seed`` (see `ForwardRequest`).
    """

    settings: SFTObjectiveSettings = field(default_factory=SFTObjectiveSettings)

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("logprobs",), embedding_noise=self.settings.neftune_alpha)

    def denominators(self, batch: Batch) -> dict[str, float]:
        return denominators(batch)

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        terms = LossTerms(batch, denominators, self.settings.aggregation)
        metrics = Metrics()
        return terms.add("loss", -terms.trained(outputs["logprobs"]), metrics), metrics


class LossTerms:
    """One micro-batch's tokens, and how its per-token losses become shares of the mini-batch's."""

    def __init__(self, batch: Batch, denominators: Mapping[str, float], aggregation: Algorithm) -> None:
        self.batch = batch
        self.denominators = denominators
        self.aggregation = aggregation
        self._trained = trained_mask(batch)
        self.mask = self._trained.float()

    def trained(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` ``[T]``, and 0 where they are not trained on, whatever stands there."""
        return torch.where(self._trained, values, 0)

    def column(self, name: str) -> torch.Tensor:
        """``name`` of the batch ``[T]``, and 0 where it is not trained on."""
        return self.trained(self.batch.flat(name))

    def declared(self, entry: Entry[Any], outputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the columns that ``entry`` needs, as `PolicyLossInputs` has them."""
        entry.check_columns({*self.batch.names, "entropy"})
        found: dict[str, Any] = {}
        for name in entry.required_columns:
            if name == "entropy":
                found[name] = self.trained(outputs["entropy"])
            elif name in self.batch.jagged_names:
                values = self.batch.flat(name)
                trained = self._trained.reshape(-1, *[1] * (values.dim() - 1))
                found[name] = torch.where(trained, values, 0) if values.is_floating_point() else values
            else:
                found[name] = self.batch[name]
        return found

    def aggregate(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the share of ``losses`` ``[T]`` in the mini-batch's."""
        if TRAJECTORY_TOKENS in self.batch and "mean_per_sequence" in self.aggregation.entry.traits:
            shares = row_shares(self.batch, trained_counts(self._trained, self.batch.lengths))
            losses = losses * per_token(shares.to(losses), self.batch.lengths)
        share: torch.Tensor = self.aggregation(losses, self.mask, self.batch.lengths, self.denominators)
        return share

    def add(self, name: str, losses: torch.Tensor, metrics: Metrics) -> torch.Tensor:
        """Return the share of ``losses``, also recorded as ``name``."""
        share = self.aggregate(losses)
        self.record(name, share, metrics)
        return share

    def record(self, name: str, share: torch.Tensor, metrics: Metrics) -> None:
        """Record so that the token-weighted mean over a mini-batch's micro-batches is the sum of their shares, and
        over several mini-batches the token-weighted mean of theirs."""
        tokens = self.mask.sum(dtype=torch.float64)
        metrics.mean(name, share.detach() * self.denominators["tokens"] / tokens.clamp(min=1), tokens)
