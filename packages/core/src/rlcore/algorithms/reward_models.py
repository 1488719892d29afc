"""The objective of reward models: a loss over the scores at the tokens under ``loss_mask``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field

from rlcore.algorithms.registries import RewardLossInputs, reward_losses
from rlcore.algorithms.sequences import per_token
from rlcore.batch import Batch
from rlcore.config import Algorithm, AlgorithmField, Config
from rlcore.engines.train import ForwardRequest
from rlcore.metrics import Metrics


class RewardObjectiveSettings(Config):
    """The loss of a reward model."""

    loss: Annotated[Algorithm, AlgorithmField(reward_losses)] = Field(  # type: ignore[assignment]
        "bradley_terry", description="Loss of scores."
    )


@dataclass(frozen=True)
class RewardObjective:
    """A loss of a model with a score head, averaged over its units: pairs, or scored tokens.

    Reads ``loss_mask``, which is 1 on the tokens whose scores are trained (the last of an answer, or of each step), and
    what the loss declares. Metrics: ``loss`` and those of the loss.
    """

    settings: RewardObjectiveSettings = field(default_factory=RewardObjectiveSettings)

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("values",), together=self.settings.loss.entry.together)

    def denominators(self, batch: Batch) -> dict[str, float]:
        together = self.settings.loss.entry.together
        units = batch.flat("loss_mask").sum() if together is None else len(batch[together].unique())
        return {"units": float(units)}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        losses, metrics = self.settings.loss(self._inputs(outputs["values"], batch))
        units = max(denominators["units"], 1.0)
        loss = losses.sum() / units
        # a share, so that the weighted mean over a mini-batch's micro-batches is the sum of their losses
        metrics.mean("loss", loss.detach() * units / max(len(losses), 1), len(losses))
        return loss.float(), metrics

    def _inputs(self, values: torch.Tensor, batch: Batch) -> RewardLossInputs:
        """Take what belongs to scored tokens."""
        entry = self.settings.loss.entry
        entry.check_columns(batch.names)
        tokens = batch.flat("loss_mask").bool().nonzero().squeeze(-1)
        columns = {
            name: (batch.flat(name) if name in batch.jagged_names else per_token(batch[name], batch.lengths))[tokens]
            for name in entry.required_columns
        }
        return RewardLossInputs(values[tokens], columns)
