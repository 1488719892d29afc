"""Sums over the tokens of long sequences are as precise as their dtype allows."""

from __future__ import annotations

import pytest
import torch

from rlcore.algorithms import aggregations, corrections
from rlcore.algorithms.discounted import discounted_suffix_sums
from rlcore.algorithms.sequences import record_mean, sequence_means, sequence_sums
from rlcore.metrics import Metrics

LONG = 1 << 17
LENGTHS = torch.tensor([LONG, 0, 1000])


def tokens(dtype: torch.dtype) -> torch.Tensor:
    """Values whose running sum drifts: all of one sign, none a power of two."""
    values = 0.1 + 0.001 * torch.rand(int(LENGTHS.sum()), generator=torch.Generator().manual_seed(0))
    return values.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, 1e-7), (torch.bfloat16, 4e-3), (torch.float64, 1e-12)]
)
def test_sums_and_means_per_sequence(dtype: torch.dtype, precision: float) -> None:
    values = tokens(dtype)
    mask = torch.ones_like(values)
    mask[1::3] = 0
    parts, chosen = (column.double().split(LENGTHS.tolist()) for column in (values, mask))
    sums = torch.stack([part.sum() for part in parts])
    means = torch.stack([(part * kept).sum() / max(float(kept.sum()), 1.0) for part, kept in zip(parts, chosen)])
    for found, expected in ((sequence_sums(values, LENGTHS), sums), (sequence_means(values, mask, LENGTHS), means)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=precision, atol=0)


def test_counts_in_bfloat16_go_beyond_256() -> None:
    assert sequence_sums(torch.ones(1000, dtype=torch.bfloat16), torch.tensor([1000])).item() == 1000


def test_sums_are_differentiable() -> None:
    values = torch.rand(5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x: sequence_sums(x, lengths), (values,))
    assert torch.autograd.gradcheck(lambda x: sequence_means(x, torch.tensor([1, 0, 1, 1, 1]), lengths), (values,))


@pytest.mark.parametrize("name", [entry.name for entry in aggregations])
def test_aggregations_of_long_sequences(name: str) -> None:
    entry = aggregations.get(name)
    losses = tokens(torch.float32)
    sums = {"tokens": float(len(losses)), "sequences": 2.0}
    params = entry.params(**({"max_length": LONG} if "norm" in name else {}))
    found, exact = (
        entry.function(column, torch.ones_like(column), LENGTHS, sums, params) for column in (losses, losses.double())
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_ratios_of_long_sequences_metrics_and_rewards_to_go() -> None:
    """A product of 131,072 ratios close to 1: an error of 1e-3 in the sum of logarithms would be one in the ratio."""
    old = 1e-5 * tokens(torch.float32)
    entry = corrections.get("tis")
    params = entry.params(level="sequence", cap=10.0)
    zeros, mask = torch.zeros_like(old), torch.ones_like(old)
    weights, _ = entry.function(zeros, old, mask, LENGTHS, params)
    exact, _ = entry.function(zeros.double(), old.double(), mask, LENGTHS, params)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=0)
    metrics = Metrics()
    record_mean(metrics, "mean", tokens(torch.bfloat16), mask)
    assert metrics.to_dict()["mean"] == pytest.approx(float(tokens(torch.bfloat16).double().mean()), rel=1e-12)
    values = tokens(torch.float32)
    rewards = discounted_suffix_sums(values, LENGTHS, 1.0)
    torch.testing.assert_close(float(rewards[0]), float(values[:LONG].double().sum()), rtol=1e-6, atol=0)
