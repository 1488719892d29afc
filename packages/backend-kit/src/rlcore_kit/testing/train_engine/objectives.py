"""Objectives for tests: losses over log-probs, values and pairs, and one that fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from rlcore.batch import Batch
from rlcore.engines import ForwardRequest
from rlcore.metrics import Metrics


@dataclasses.dataclass
class WeightedLogprobs:
    """Loss ``−Σ(w · log π + 0.05 · H) / N`` with the column ``weights``; ``scale`` makes it non-finite on demand."""

    temperature: float = 1.0
    scale: float = 1.0

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("logprobs", "entropy"), self.temperature)

    def denominators(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(batch.flat("loss_mask").sum())}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        weighted = (outputs["logprobs"] * batch.flat("weights") + 0.05 * outputs["entropy"]).sum()
        metrics = Metrics()
        mask = batch.flat("loss_mask")
        metrics.mean(
            "entropy", float(outputs["entropy"].detach().sum()) / max(1.0, float(mask.sum())), float(mask.sum())
        )
        metrics.sum("samples", len(batch))
        return -weighted * self.scale / denominators["tokens"], metrics


@dataclasses.dataclass
class BreaksOff(WeightedLogprobs):
    """Fails in the second micro-batch, after the gradient of the first."""

    calls: int = 0

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("broken objective")
        return super().loss(outputs, batch, denominators)


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Loss ``Σ mask · (v − target)² / N``; the target of all outputs of a head is the same."""

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("values",))

    def denominators(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(batch.flat("loss_mask").sum())}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        values = outputs["values"].view(batch.total_tokens, -1)
        error = (values - batch.flat("weights")[:, None]).square() * batch.flat("loss_mask")[:, None]
        loss = error.sum() / denominators["tokens"]
        metrics = Metrics()
        metrics.sum("loss", loss.detach())
        return loss, metrics


@dataclasses.dataclass(frozen=True)
class PairMargin:
    """Loss ``−Σ log σ(s₀ − s₁) / N`` over the pairs of the column ``pair``; s is the sum of a sample's log-probs."""

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("logprobs",), together="pair")

    def denominators(self, batch: Batch) -> dict[str, float]:
        return {"pairs": float(len(batch["pair"].unique()))}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        sums = torch.stack([part.sum() for part in batch.jagged(outputs["logprobs"]).to_list()])
        _, order, counts = torch.unique(batch["pair"], return_inverse=True, return_counts=True)
        assert bool((counts == 2).all()), f"a micro-batch holds parts of pairs: {batch['pair'].tolist()}"
        first, second = sums[order.argsort(stable=True)].reshape(-1, 2).T
        metrics = Metrics()
        metrics.sum("pairs", len(counts))
        return -torch.nn.functional.logsigmoid(first - second).sum() / denominators["pairs"], metrics
