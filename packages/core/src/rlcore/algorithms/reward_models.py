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

    A model with several outputs gives ``values`` and has ``labels`` ``[T, outputs]``; NaN is no label. The loss is the
    mean over all labels; metrics are also under the name of each output.

    Attributes:
        outputs: names of the model's outputs; () for a model with one.
    """

    settings: RewardObjectiveSettings = field(default_factory=RewardObjectiveSettings)
    outputs: tuple[str, ...] = ()

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("values",), together=self.settings.loss.entry.together)

    def denominators(self, batch: Batch) -> dict[str, float]:
        together = self.settings.loss.entry.together
        if together is not None:
            return {"units": float(len(batch[together].unique()))}
        mask = batch.flat("loss_mask")
        trained = mask[:, None] * ~batch.flat("labels").isnan() if self.outputs else mask
        return {"units": float(trained.sum())}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        inputs = self._inputs(outputs["values"], batch)
        losses, metrics = self._losses(inputs) if self.outputs else self.settings.loss(inputs)
        units = max(denominators["units"], 1.0)
        loss = losses.sum() / units
        # a share, so that the weighted mean over a mini-batch's micro-batches is the sum of their losses
        metrics.mean("loss", loss.detach() * units / max(len(losses), 1), len(losses))
        return loss.float(), metrics

    def _losses(self, inputs: RewardLossInputs) -> tuple[torch.Tensor, Metrics]:
        """Return the losses of all labels, and the metrics of all outputs together and of each."""
        found, metrics = [], Metrics()
        for index, name in enumerate(self.outputs):
            labelled = ~inputs.columns["labels"][:, index].isnan()
            columns = {key: column[labelled] for key, column in inputs.columns.items()}
            columns["labels"] = columns["labels"][:, index]
            losses, measured = self.settings.loss(RewardLossInputs(inputs.scores[labelled, index], columns))
            found.append(losses)
            metrics.update(measured.prefixed(f"{name}/"))
            metrics = Metrics.merge([metrics, measured])
        return torch.cat(found), metrics

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
