"""The objective of preference optimisation: a preference loss over the answers of a mini-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rlcore.algorithms.registries import Answers, PreferenceInputs, Preferences, preference_losses
from rlcore.algorithms.sequences import sequence_sums, trained_counts, trained_mask
from rlcore.batch import Batch
from rlcore.config import Algorithm, AlgorithmField, Config
from rlcore.engines.train import ForwardRequest
from rlcore.errors import BatchError
from rlcore.metrics import Metrics


class PreferenceObjectiveSettings(Config):
    """The loss of preference optimisation: preference loss + sft_coeff · negative log-likelihood of chosen answers."""

    loss: Annotated[Algorithm, AlgorithmField(preference_losses)] = Field(  # type: ignore[assignment]
        "dpo", description="Preference loss."
    )
    sft_coeff: float = Field(
        0.0,
        ge=0,
        description="Weight of the chosen answers' negative log-likelihood per token (RPO; keeps them from becoming "
        "less likely). orpo, cpo and slic contain such a term.",
    )


def answer_logprobs(batch: Batch, logprobs: torch.Tensor) -> torch.Tensor:
    """Return the log-prob of each row's answer: the sum of ``logprobs`` ``[T]`` over trained tokens, ``[B]`` fp64."""
    return sequence_sums(torch.where(trained_mask(batch), logprobs, 0).double(), batch.lengths)


@dataclass(frozen=True)
class PreferenceObjective:
    """A preference loss, averaged over the pairs of the mini-batch (or over its answers, if the loss has no pairs).

    Reads ``loss_mask``; ``side`` (dense int64: 0 chosen, 1 rejected); of a loss of pairs ``pair`` (dense int64), which
    a chosen and a rejected row have in common; and what the loss declares:

    - ``ref_answer_logprob`` (dense fp64): log-prob of the row's answer under the reference;
    - ``margin`` (dense floating): by how much a pair's chosen answer is better, on both its rows;
    - ``kl_log_ratio`` (dense fp64): log(π / π_ref) of an answer to another prompt after this row's prompt. Its mean
      over the mini-batch, at least 0, is the KL.

    Metrics: ``loss``, ``sft_loss`` (before its coefficient), ``kl``, and per answer or pair ``rewards/chosen``,
    ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen`` and ``logps/rejected``. Without
    pairs there are no accuracies, and the margins are the difference of both means.
    """

    settings: PreferenceObjectiveSettings
    temperature: float = 1.0

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("logprobs",), self.temperature, self.settings.loss.entry.together)

    @property
    def paired(self) -> bool:
        """Whether the loss compares two answers to one prompt."""
        return self.settings.loss.entry.together is not None

    def denominators(self, batch: Batch) -> dict[str, float]:
        chosen = float((batch["side"] == 0).sum())
        sums = {"units": chosen if self.paired else float(len(batch)), "chosen": chosen}
        if "kl_log_ratio" in self.settings.loss.entry.required_columns:
            sums["kl_log_ratio"] = float(batch["kl_log_ratio"].sum())
        return sums

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        settings, metrics = self.settings, Metrics()
        settings.loss.entry.check_columns(batch.names)
        inputs = self._inputs(answer_logprobs(batch, outputs["logprobs"]), batch, denominators)
        found: Preferences = settings.loss(inputs)
        units = max(denominators["units"], 1.0)
        loss = found.losses.sum() / units
        if settings.sft_coeff:
            likelihood = -inputs.chosen.mean_logprobs.sum() / max(denominators["chosen"], 1.0)
            metrics.mean("sft_loss", -_mean(inputs.chosen.mean_logprobs), len(inputs.chosen.tokens))
            loss = loss + settings.sft_coeff * likelihood
        # a share, so that the weighted mean over a mini-batch's micro-batches is the sum of their losses
        count = len(found.losses)
        metrics.mean("loss", loss.detach() * units / max(count, 1), count)
        if "kl_log_ratio" in denominators:
            metrics.mean("kl", inputs.kl, count)
        _record(metrics, found, inputs, self.paired)
        return loss.float(), metrics

    def _inputs(self, logprobs: torch.Tensor, batch: Batch, denominators: Mapping[str, float]) -> PreferenceInputs:
        """Divide the rows into both sides."""
        tokens = trained_counts(trained_mask(batch), batch.lengths).to(logprobs).clamp(min=1)
        references = (
            batch["ref_answer_logprob"].to(logprobs)
            if "ref_answer_logprob" in self.settings.loss.entry.required_columns
            else torch.zeros_like(logprobs)
        )
        chosen, rejected = ((batch["side"] == side).nonzero().squeeze(-1) for side in (0, 1))
        if self.paired:
            chosen, rejected = (rows[batch["pair"][rows].argsort()] for rows in (chosen, rejected))
            if not torch.equal(batch["pair"][chosen], batch["pair"][rejected]):
                raise BatchError("a pair is not one chosen and one rejected row: columns 'pair' and 'side' disagree")
        sides = [Answers(logprobs[rows], references[rows], tokens[rows]) for rows in (chosen, rejected)]
        kl = denominators.get("kl_log_ratio", 0.0) / max(denominators["units"], 1.0)
        declared = "margin" in self.settings.loss.entry.required_columns
        margins = batch["margin"][chosen].to(logprobs) if declared else None
        return PreferenceInputs(sides[0], sides[1], max(kl, 0.0), margins)


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.detach().sum() / max(len(values), 1)


def _record(metrics: Metrics, found: Preferences, inputs: PreferenceInputs, paired: bool) -> None:
    """Record rewards and log-probs of both sides."""
    for side, answers, rewards in (
        ("chosen", inputs.chosen, found.chosen_rewards),
        ("rejected", inputs.rejected, found.rejected_rewards),
    ):
        metrics.mean(f"rewards/{side}", _mean(rewards), len(rewards))
        metrics.mean(f"logps/{side}", _mean(answers.logprobs), len(rewards))
    if paired:
        margins = found.chosen_rewards - found.rejected_rewards
        metrics.mean("rewards/margins", _mean(margins), len(margins))
        metrics.mean("rewards/accuracies", _mean((margins > 0).double()), len(margins))
