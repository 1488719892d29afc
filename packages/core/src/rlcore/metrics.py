"""Metrics that know how they are reduced.

Whoever records a number says how numbers of that name combine across micro-batches, ranks and steps; nobody guesses
later. Values may be tensors: they are read only in `Metrics.to_dict`, so recording never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

Reduction = Literal["mean", "sum", "min", "max"]
Number = float | torch.Tensor


@dataclass(frozen=True)
class Metric:
    """``value`` with its ``weight`` (how many tokens, samples … it stands for; used by "mean" only)."""

    value: Number
    reduction: Reduction
    weight: Number = 1.0

    def merge(self, other: Metric) -> Metric:
        if self.reduction != other.reduction:
            raise ValueError(f"a metric was recorded as {self.reduction!r} and as {other.reduction!r}")
        if self.reduction == "sum":
            return Metric(self.value + other.value, "sum")
        if self.reduction == "mean":
            weight = self.weight + other.weight
            scale = 1 / weight if float(weight) else 0.0
            return Metric((self.value * self.weight + other.value * other.weight) * scale, "mean", weight)
        pick = max if self.reduction == "max" else min
        return Metric(pick(float(self.value), float(other.value)), self.reduction)


class Metrics(dict[str, Metric]):
    """Named metrics. `merge` combines two sets, `to_dict` gives plain floats."""

    def mean(self, name: str, value: Number, weight: Number = 1.0) -> None:
        self._record(name, Metric(value, "mean", weight))

    def sum(self, name: str, value: Number) -> None:
        self._record(name, Metric(value, "sum"))

    def min(self, name: str, value: Number) -> None:
        self._record(name, Metric(value, "min"))

    def max(self, name: str, value: Number) -> None:
        self._record(name, Metric(value, "max"))

    def _record(self, name: str, metric: Metric) -> None:
        self[name] = self[name].merge(metric) if name in self else metric

    @classmethod
    def merge(cls, parts: Iterable[Metrics]) -> Metrics:
        merged = cls()
        for part in parts:
            for name, metric in part.items():
                merged._record(name, metric)
        return merged

    def prefixed(self, prefix: str) -> Metrics:
        return Metrics({f"{prefix}{name}": metric for name, metric in self.items()})

    def to_dict(self) -> dict[str, float]:
        return {name: float(metric.value) for name, metric in self.items()}
