"""Metrics that know how they are reduced.

Whoever records a number says how numbers of that name combine across micro-batches, ranks and steps; nobody guesses
later. Values may be tensors: they are read only in `Metrics.to_dict` and when metrics are sent to another process, so
recording and merging never wait for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Reduction = Literal["mean", "sum", "min", "max"]
Number = float | torch.Tensor


@dataclass(frozen=True)
class Metric:
    """A number and how it combines with others of its name.

    Attributes:
        total: the number; for "mean" the sum of values times weights.
        weight: how many tokens, samples … a "mean" stands for; 0 says that nothing was measured.
    """

    total: Number
    reduction: Reduction
    weight: Number = 1.0

    @property
    def value(self) -> float:
        """The reduced number; NaN for a mean of weight 0. Waits for the GPU if it is there."""
        if self.reduction != "mean":
            return float(self.total)
        weight = float(self.weight)
        return float(self.total) / weight if weight else math.nan

    def merge(self, other: Metric) -> Metric:
        """The two as one number. NaN stays NaN.

        Raises:
            ValueError: they are reduced in different ways.
        """
        if self.reduction != other.reduction:
            raise ValueError(f"recorded as {self.reduction!r} and as {other.reduction!r}")
        if self.reduction == "mean":
            return Metric(self.total + other.total, "mean", self.weight + other.weight)
        if self.reduction == "sum":
            return Metric(self.total + other.total, "sum")
        return Metric(_extreme(self.reduction, self.total, other.total), self.reduction)


class Metrics(dict[str, Metric]):
    """Named metrics. `merge` combines several sets, `to_dict` gives plain floats."""

    def mean(self, name: str, value: Number, weight: Number = 1.0) -> None:
        """``value`` is a mean over ``weight`` things; it does not count (even if it is NaN) where ``weight`` is 0."""
        value, weight = _scalar(name, value), _scalar(name, weight)
        if isinstance(weight, torch.Tensor):
            product = value * weight
            total: Number = torch.where(weight.to(product.device) == 0, torch.zeros_like(product), product)
        else:
            total = value * weight if weight else 0.0
        self._record(name, Metric(total, "mean", weight))

    def sum(self, name: str, value: Number) -> None:
        self._record(name, Metric(_scalar(name, value), "sum"))

    def min(self, name: str, value: Number) -> None:
        self._record(name, Metric(_scalar(name, value), "min"))

    def max(self, name: str, value: Number) -> None:
        self._record(name, Metric(_scalar(name, value), "max"))

    def _record(self, name: str, metric: Metric) -> None:
        try:
            self[name] = self[name].merge(metric) if name in self else metric
        except ValueError as error:
            raise ValueError(f"metric {name!r} was {error}") from None

    @classmethod
    def merge(cls, parts: Iterable[Metrics]) -> Metrics:
        """What would have been recorded had all ``parts`` been recorded in one place."""
        merged = cls()
        for part in parts:
            for name, metric in part.items():
                merged._record(name, metric)
        return merged

    def prefixed(self, prefix: str) -> Metrics:
        return Metrics({f"{prefix}{name}": metric for name, metric in self.items()})

    def to_dict(self) -> dict[str, float]:
        """Plain floats. Means of weight 0 are left out: nothing was measured."""
        return {name: metric.value for name, metric in self.items() if metric.reduction != "mean" or metric.weight}

    def __reduce__(self) -> tuple[Any, ...]:
        # plain floats: another process may not have this one's device
        plain = {name: Metric(float(m.total), m.reduction, float(m.weight)) for name, m in self.items()}
        return Metrics, (plain,)


def _scalar(name: str, value: Number) -> Number:
    """``value`` without its graph, in double precision as Python's floats: sums of counts must not round.

    Raises:
        ValueError: it is a tensor of more (or less) than one number.
    """
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"metric {name!r} must be one number, not a tensor of shape {list(value.shape)}")
    return value.detach().reshape(()).double()


def _extreme(reduction: Reduction, a: Number, b: Number) -> Number:
    like = a if isinstance(a, torch.Tensor) else b
    if isinstance(like, torch.Tensor):
        x, y = (n.to(like.device) if isinstance(n, torch.Tensor) else like.new_tensor(n) for n in (a, b))
        return torch.maximum(x, y) if reduction == "max" else torch.minimum(x, y)
    if math.isnan(a) or math.isnan(b):
        return math.nan
    return max(a, b) if reduction == "max" else min(a, b)
