"""Metrics combine as if all had been recorded in one place, and never wait for a device while they do."""

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlcore.metrics import Metric, Metrics

samples = st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 5)), min_size=1, max_size=12)


def record(values: list[tuple[float, int]], tensors: bool = False) -> Metrics:
    metrics = Metrics()
    for value, weight in values:
        number: Any = torch.tensor(value, dtype=torch.float64) if tensors else value
        metrics.mean("mean", number, torch.tensor(weight) if tensors else weight)
        metrics.sum("sum", number)
        metrics.min("min", number)
        metrics.max("max", number)
    return metrics


def oracle(values: list[tuple[float, int]]) -> dict[str, float]:
    every = [value for value, weight in values for _ in range(weight)]
    plain = [value for value, _ in values]
    mean = {"mean": sum(every) / len(every)} if every else {}
    return mean | {"sum": sum(plain), "min": min(plain), "max": max(plain)}


@given(samples, st.booleans())
def test_reductions(values: list[tuple[float, int]], tensors: bool) -> None:
    assert record(values, tensors).to_dict() == pytest.approx(oracle(values), rel=1e-12, abs=1e-9)


@given(samples, st.integers(1, 4), st.booleans())
def test_merging_parts_is_recording_in_one_place(values: list[tuple[float, int]], parts: int, tensors: bool) -> None:
    """Micro-batches, ranks or steps: however the samples are divided, the numbers are the same."""
    divided = [record(values[part::parts], tensors and part % 2 == 0) for part in range(parts)]
    before = [part.to_dict() for part in divided]
    assert Metrics.merge(divided).to_dict() == pytest.approx(oracle(values), rel=1e-12, abs=1e-9)
    assert Metrics.merge([Metrics(), *divided]).to_dict() == Metrics.merge(divided).to_dict()
    assert [part.to_dict() for part in divided] == before


@pytest.mark.parametrize("nothing", [math.nan, torch.tensor(math.nan)])
def test_what_has_no_weight_does_not_count(nothing: float | torch.Tensor) -> None:
    metrics = Metrics()
    metrics.mean("loss", nothing, 0)
    metrics.mean("clip", nothing, torch.tensor(0.0))
    assert metrics.to_dict() == {}
    assert math.isnan(metrics["loss"].value)
    metrics.mean("loss", 3.0, 2)
    metrics.mean("clip", torch.tensor(4.0), torch.tensor(1))
    assert metrics.to_dict() == {"loss": 3.0, "clip": 4.0}


@pytest.mark.parametrize("record", [Metrics.mean, Metrics.sum, Metrics.min, Metrics.max])
@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
@pytest.mark.parametrize("make", [float, torch.tensor])
def test_nan_is_not_hidden(record: Any, values: tuple[float, float], make: Any) -> None:
    metrics = Metrics()
    for value in values:
        record(metrics, "x", make(value))
    assert math.isnan(metrics.to_dict()["x"])


def test_recording_and_merging_read_no_tensor() -> None:
    """Tensors on the meta device have no values that could be read."""
    value = torch.empty((), device="meta")

    def part() -> Metrics:
        metrics = Metrics()
        for _ in range(2):
            metrics.mean("mean", value, value)
            metrics.sum("sum", value)
            metrics.min("min", value)
            metrics.max("max", 1.0)
            metrics.max("max", value)
        return metrics

    merged = Metrics.merge([part(), part()]).prefixed("actor/")
    with pytest.raises(RuntimeError, match="meta"):
        merged.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_sums_do_not_round(dtype: torch.dtype) -> None:
    metrics = Metrics()
    for _ in range(1000):
        metrics.sum("tokens", torch.tensor(1, dtype=dtype))
    metrics.max("longest", torch.tensor(1, dtype=dtype))
    metrics.max("longest", 1.25)
    assert metrics.to_dict() == {"tokens": 1000, "longest": 1.25}


def test_recording_keeps_no_graph() -> None:
    metrics = Metrics()
    metrics.mean("loss", torch.ones(1, requires_grad=True) * 2, torch.ones((), requires_grad=True))
    total = metrics["loss"].total
    assert isinstance(total, torch.Tensor)
    assert not total.requires_grad


def test_a_pickle_holds_plain_numbers() -> None:
    metrics = record([(1.0, 2), (2.0, 3)], tensors=True)
    loaded = pickle.loads(pickle.dumps(metrics))
    assert type(loaded) is Metrics
    assert loaded.to_dict() == metrics.to_dict()
    assert all(type(metric.total) is float for metric in loaded.values())
    assert Metrics.merge([loaded, metrics]).to_dict()["mean"] == pytest.approx(1.6)


def test_names_and_prefixes() -> None:
    metrics = Metrics()
    metrics.sum("tokens", 3)
    assert metrics.prefixed("perf/").to_dict() == {"perf/tokens": 3.0}
    assert metrics["tokens"] == Metric(3.0, "sum")


def test_errors_name_the_metric() -> None:
    metrics = Metrics()
    metrics.mean("loss", 1.0)
    with pytest.raises(ValueError, match="metric 'loss' was recorded as 'mean' and as 'sum'"):
        metrics.sum("loss", 1.0)
    with pytest.raises(ValueError, match=r"metric 'loss' must be one number, not a tensor of shape \[2\]"):
        metrics.mean("loss", torch.zeros(2))


# --- quantiles -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), q=st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0]), parts=st.integers(1, 5))
def test_quantiles_of_merged_parts_are_those_of_the_whole(seed: int, q: float, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(300, generator=generator) * 10 ** (4 * torch.rand(300, generator=generator) - 3)
    mask = (torch.rand(300, generator=generator) < 0.7).float()
    measured = []
    for chosen in torch.arange(300).chunk(parts):
        metrics = Metrics()
        metrics.quantile("x", values[chosen], q, mask[chosen])
        measured.append(pickle.loads(pickle.dumps(metrics)))
    found = Metrics.merge(measured).to_dict()["x"]
    ordered = values[mask.bool()].sort().values.tolist()
    expected = ordered[max(math.ceil(q * len(ordered)) - 1, 0)]
    assert found == pytest.approx(expected, rel=0.065, abs=1e-7)


def test_quantiles_of_extremes_and_of_nothing() -> None:
    metrics = Metrics()
    metrics.quantile("none", torch.tensor([1.0, 2.0]), 0.5, torch.zeros(2))
    metrics.quantile("empty", torch.zeros(0), 0.5, torch.zeros(0))
    metrics.quantile("zero", torch.zeros(3), 0.5, torch.ones(3))
    metrics.quantile("huge", torch.tensor([math.inf, 1e30, math.nan]), 0.5, torch.ones(3))
    metrics.quantile("low", torch.tensor([-math.inf, 0.0, 1.0]), 0.0, torch.ones(3))
    found = metrics.to_dict()
    assert set(found) == {"zero", "huge", "low"}
    assert found["zero"] == 0
    assert found["huge"] > 5e7
    assert found["low"] < -5e7
    assert math.isnan(metrics["none"].value)


def test_different_quantiles_do_not_merge() -> None:
    metrics = Metrics()
    metrics.quantile("x", torch.ones(1), 0.5, torch.ones(1))
    with pytest.raises(ValueError, match=r"metric 'x' was recorded as the quantiles 0\.5 and 0\.9"):
        metrics.quantile("x", torch.ones(1), 0.9, torch.ones(1))
