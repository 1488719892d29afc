"""The loss of distillation: a divergence from a teacher, with a policy gradient and a likelihood term as needed.

The divergence is over the whole vocabulary, or over the teacher's k best tokens and one bucket for all others
(`rlcore.algorithms.divergence`). Softmax and divergence are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rlcore.algorithms.aggregation import denominators
from rlcore.algorithms.divergence import bucketed
from rlcore.algorithms.objectives import LossTerms, PolicyObjective, PolicyObjectiveSettings
from rlcore.algorithms.registries import divergences
from rlcore.algorithms.sequences import record_mean, trained_mask
from rlcore.batch import Batch
from rlcore.config import Algorithm, AlgorithmField, Config
from rlcore.engines.train import Comparison, ForwardRequest, Output
from rlcore.metrics import Metrics

GIVEN = "given_mask"
"""Jagged column, 1 on the tokens of completions that the data set gives: those that the likelihood term is for."""


class DivergenceSettings(Config):
    """Divergence of the student from its teacher as a term of the loss."""

    kind: Annotated[Algorithm, AlgorithmField(divergences)] = Field(  # type: ignore[assignment]  # a name is enough
        "reverse-kl", description="Divergence."
    )
    coeff: float = Field(1.0, ge=0, description="Weight of the term; 0 is off.")
    top_k: int | None = Field(
        None,
        ge=1,
        description="Compare the teacher's k best tokens and one bucket for all others; null: the whole vocabulary.",
    )


class DistillObjectiveSettings(PolicyObjectiveSettings):
    """The loss of the student: divergence.coeff · divergence + nll_coeff · NLL of given completions + policy loss."""

    divergence: DivergenceSettings = Field(
        default_factory=DivergenceSettings, description="Divergence from the teacher."
    )
    nll_coeff: float = Field(
        0.0,
        ge=0,
        description="Weight of the negative log-likelihood of completions that the data set gives; never of those that "
        "the student sampled, which it would only learn to repeat.",
    )


@dataclass(frozen=True)
class DistillObjective:
    """Divergence from a teacher, likelihood of given completions, and policy gradient.

    Reads ``teacher_top_ids`` and ``teacher_top_logprobs`` ``[T, k]``, or what ``comparison`` names; `GIVEN` where
    present; with ``policy`` what `PolicyObjective` reads.

    Metrics: ``loss``, ``divergence`` and ``nll`` (before their coefficients); with top k the mean masses that the k
    tokens have: ``teacher_top_mass`` and ``student_top_mass``; those of the policy loss.

    Attributes:
        policy: whether samples have advantages to train on.
        comparison: of the whole vocabulary; None compares the k best tokens.
        old_from_rollout: see `PolicyObjective`.
    """

    settings: DistillObjectiveSettings
    temperature: float = 1.0
    policy: bool = False
    comparison: Comparison | None = None
    old_from_rollout: bool = False

    @property
    def request(self) -> ForwardRequest:
        outputs: tuple[Output, ...] = ("logprobs", "entropy") if self.policy else ()
        if self.settings.nll_coeff and not self.policy:
            outputs += ("logprobs",)
        compared = self.settings.divergence.coeff > 0
        if compared:
            outputs += ("candidate_logprobs",) if self.comparison is None else ("divergence",)
        return ForwardRequest(
            outputs,
            self.temperature,
            self.settings.policy_loss.entry.together if self.policy else None,
            candidates="teacher_top_ids" if compared and self.comparison is None else None,
            comparison=self.comparison if compared else None,
        )

    def denominators(self, batch: Batch) -> dict[str, float]:
        given = dict.fromkeys(("tokens", "sequences"), 0.0)
        if GIVEN in batch:
            given = denominators(batch.with_columns(loss_mask=batch[GIVEN]))
        return denominators(batch) | {f"given_{name}": value for name, value in given.items()}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        settings, metrics = self.settings, Metrics()
        terms = LossTerms(batch, denominators, settings.aggregation)
        loss = terms.mask.new_zeros(())
        if self.policy:
            policy = PolicyObjective(settings, self.temperature, self.old_from_rollout)
            loss, metrics = policy.loss(outputs, batch, denominators)
            metrics.pop("loss")
        if settings.divergence.coeff:
            values = outputs["divergence"] if self.comparison else self._of_top(outputs, batch, metrics)
            loss = loss + settings.divergence.coeff * terms.add("divergence", terms.trained(values), metrics)
        if settings.nll_coeff and GIVEN in batch:
            loss = loss + settings.nll_coeff * self._nll(outputs["logprobs"], batch, denominators, metrics)
        terms.record("loss", loss, metrics)
        return loss, metrics

    def _of_top(self, outputs: Mapping[str, torch.Tensor], batch: Batch, metrics: Metrics) -> torch.Tensor:
        """Return the divergence ``[T]`` over the teacher's best tokens and the bucket of all others."""
        mask = trained_mask(batch)
        positions = mask.nonzero().squeeze(-1)
        student, teacher = outputs["candidate_logprobs"], batch.flat("teacher_top_logprobs")
        for name, logprobs in (("teacher_top_mass", teacher), ("student_top_mass", student)):
            record_mean(metrics, name, logprobs.detach().logsumexp(-1).exp(), mask.float())
        summands = self.settings.divergence.kind(bucketed(student[positions]), bucketed(teacher[positions].float()))
        return student.new_zeros(len(mask)).index_copy(0, positions, summands.sum(-1))

    def _nll(
        self, logprobs: torch.Tensor, batch: Batch, denominators: Mapping[str, float], metrics: Metrics
    ) -> torch.Tensor:
        """Return the share of the negative log-likelihood of given completions, normalised over these alone."""
        given = LossTerms(
            batch.with_columns(loss_mask=batch[GIVEN]),
            {name: denominators[f"given_{name}"] for name in ("tokens", "sequences")},
            self.settings.aggregation,
        )
        return given.add("nll", -given.trained(logprobs), metrics)
