"""Metrics that know how they are reduced.

The code that records a number states how numbers of that name combine over micro-batches, ranks and steps. Values may
be tensors: they are read only in `Metrics.to_dict` and when metrics are sent to another process, so recording and
merging never wait for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Reduction = Literal["mean", "sum", "min", "max", "quantile"]
Number = float | torch.Tensor

# Quantiles are read off a histogram whose bins are as wide as they are far from 0: equal in log(1 + |x| / _FINEST).
_FINEST = 1e-6
_BINS_PER_E = 16  # 6 % between neighbours
_BINS = 512  # on either side of 0; the last begins at 8e7


@dataclass(frozen=True)
class Metric:
    """A number and how it combines with others of its name.

    Attributes:
        total: the number; for "mean" the sum of values times weights, for "quantile" counts in bins, ``[1025]``.
        weight: number of tokens, samples … of a "mean"; 0 if nothing was measured. For "quantile": which one, 0 to 1.
    """

    total: Number
    reduction: Reduction
    weight: Number = 1.0

    @property
    def value(self) -> float:
        """The reduced number; NaN for a mean or a quantile of nothing. Waits for the GPU if it is there."""
        if self.reduction == "quantile":
            assert isinstance(self.total, torch.Tensor)
            return _read_quantile(self.total.cpu(), float(self.weight))
        if self.reduction != "mean":
            return float(self.total)
        weight = float(self.weight)
        return float(self.total) / weight if weight else math.nan

    def merge(self, other: Metric) -> Metric:
        """Merge two numbers into one. NaN stays NaN.

        Raises:
            ValueError: the numbers are reduced in different ways.
        """
        if self.reduction != other.reduction:
            raise ValueError(f"recorded as {self.reduction!r} and as {other.reduction!r}")
        if self.reduction == "mean":
            return Metric(self.total + other.total, "mean", self.weight + other.weight)
        if self.reduction == "sum":
            return Metric(self.total + other.total, "sum")
        if self.reduction == "quantile":
            if self.weight != other.weight:
                raise ValueError(f"recorded as the quantiles {self.weight} and {other.weight}")
            return Metric(self.total + other.total, "quantile", self.weight)
        return Metric(_extreme(self.reduction, self.total, other.total), self.reduction)


class Metrics(dict[str, Metric]):
    """Named metrics. `merge` combines several sets, `to_dict` returns plain floats."""

    def mean(self, name: str, value: Number, weight: Number = 1.0) -> None:
        """Record ``value``, a mean over ``weight`` items; it does not count (even if it is NaN) if ``weight`` is 0."""
        value, weight = _scalar(name, value), _scalar(name, weight)
        if isinstance(weight, torch.Tensor):
            product = value * weight
            total: Number = torch.where(weight.to(product.device) == 0, torch.zeros_like(product), product)
        else:
            total = value * weight if weight else 0.0
        self._record(name, Metric(total, "mean", weight))

    def sum(self, name: str, value: Number) -> None:
        """Record a number that is added to others of its name."""
        self._record(name, Metric(_scalar(name, value), "sum"))

    def min(self, name: str, value: Number) -> None:
        """Record a number of which the smallest is kept."""
        self._record(name, Metric(_scalar(name, value), "min"))

    def max(self, name: str, value: Number) -> None:
        """Record a number of which the largest is kept."""
        self._record(name, Metric(_scalar(name, value), "max"))

    def quantile(self, name: str, values: torch.Tensor, q: float, mask: torch.Tensor) -> None:
        """Record the quantile ``q`` of ``values`` ``[N]`` where ``mask`` ``[N]`` is 1, over all parts that are merged.

        It is exact within 6 % of its distance from 0 (or 1e-7), up to 8e7; NaN counts as the largest.
        """
        size = (values.detach().double().abs() / _FINEST).log1p() * _BINS_PER_E
        size = size.nan_to_num(nan=_BINS).clamp(max=_BINS).floor().long()
        bins = torch.where(values < 0, -size, size) + _BINS
        counts = torch.zeros(2 * _BINS + 1, dtype=torch.float64, device=values.device)
        self._record(name, Metric(counts.index_add_(0, bins, mask.double()), "quantile", q))

    def _record(self, name: str, metric: Metric) -> None:
        try:
            self[name] = self[name].merge(metric) if name in self else metric
        except ValueError as error:
            raise ValueError(f"metric {name!r} was {error}") from None

    @classmethod
    def merge(cls, parts: Iterable[Metrics]) -> Metrics:
        """Merge metrics of several parts into those of their union."""
        merged = cls()
        for part in parts:
            for name, metric in part.items():
                merged._record(name, metric)
        return merged

    def prefixed(self, prefix: str) -> Metrics:
        """Return the same metrics with ``prefix`` before their names."""
        return Metrics({f"{prefix}{name}": metric for name, metric in self.items()})

    def to_dict(self) -> dict[str, float]:
        """Return plain floats, without means and quantiles of which nothing was measured."""
        return {name: metric.value for name, metric in self.items() if not _of_nothing(metric)}

    def __reduce__(self) -> tuple[Any, ...]:
        # plain floats (counts on the CPU): another process may not have this one's device
        plain = {name: Metric(_portable(m.total), m.reduction, float(m.weight)) for name, m in self.items()}
        return Metrics, (plain,)


def _of_nothing(metric: Metric) -> bool:
    if metric.reduction == "quantile":
        return not float(metric.total.sum())  # type: ignore[union-attr]
    return metric.reduction == "mean" and not metric.weight


def _portable(total: Number) -> Number:
    return total.cpu() if isinstance(total, torch.Tensor) and total.dim() else float(total)


def _read_quantile(counts: torch.Tensor, q: float) -> float:
    """Return the middle of the bin in which the quantile lies; NaN without counts."""
    cumulative = counts.cumsum(0)
    if not cumulative[-1]:
        return math.nan
    index = int(torch.searchsorted(cumulative, max(q * float(cumulative[-1]), 0.5))) - _BINS
    return math.copysign(_FINEST * math.expm1((abs(index) + 0.5) / _BINS_PER_E), index) if index else 0.0


def _scalar(name: str, value: Number) -> Number:
    """Detach ``value`` and convert it to double precision, so that sums of counts are exact.

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
