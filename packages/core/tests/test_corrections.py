"""Importance weights between rollout and trainer, and the measures of their mismatch, against loops and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlcore.algorithms import corrections
from rlcore.algorithms.off_policy import mismatch_metrics
from rlcore.metrics import Metrics

LENGTHS = torch.tensor([3, 0, 6, 4])


def case(seed: int, spread: float = 0.8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(13, generator=generator) < 0.8).double()
    mask[[0, 3, 9]] = 0
    rollout = -2 * torch.rand(13, generator=generator, dtype=torch.float64)
    old = rollout + spread * torch.randn(13, generator=generator, dtype=torch.float64)
    return rollout * mask, old * mask, mask


def weigh(name: str, seed: int, **params: object) -> tuple[torch.Tensor, Metrics]:
    rollout, old, mask = case(seed)
    entry = corrections.get(name)
    return entry.function(rollout, old.requires_grad_(), mask, LENGTHS, entry.params(**params))


def expected_weights(name: str, seed: int, **params: float | str) -> list[float]:
    rollout, old, mask = (column.split(LENGTHS.tolist()) for column in case(seed))
    weights = []
    for sample in zip(rollout, old, mask):
        tokens = [(o - r, m) for r, o, m in zip(*(column.tolist() for column in sample))]
        trained = [d for d, m in tokens if m]
        for d, _ in tokens:
            if params.get("level") == "sequence":
                rho = math.exp(sum(trained))
            elif params.get("level") == "geometric":
                rho = math.prod(math.exp(d) for d in trained) ** (1 / max(len(trained), 1))
            else:
                rho = math.exp(d)
            if name == "tis":
                weights.append(min(rho, params.get("cap", 2.0)))
            elif name == "mis":
                inside = params.get("low", 0.5) <= rho <= params.get("high", 2.0)
                weights.append((1.0 if params.get("weight") == "one" else rho) if inside else 0.0)
            else:
                weights.append(rho if params.get("low", 0.5) <= rho <= params.get("high", 5.0) else 0.0)
    return weights


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("tis", {}),
        ("tis", {"cap": 1.1}),
        ("tis", {"level": "sequence", "cap": 1.5}),
        ("icepop", {}),
        ("icepop", {"low": 0.9, "high": 1.2}),
        ("mis", {}),
        ("mis", {"low": 0.0, "high": 1.5}),
        ("mis", {"level": "sequence", "low": 0.3, "high": 3.0}),
        ("mis", {"level": "sequence", "low": 0.3, "high": 3.0, "weight": "one"}),
        ("mis", {"level": "geometric", "low": 0.8, "high": 1.25}),
        ("mis", {"level": "geometric", "low": 0.8, "high": 1.25, "weight": "one"}),
        ("mis", {"weight": "one"}),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_weights(name: str, params: dict, seed: int) -> None:
    weights, metrics = weigh(name, seed, **params)
    expected = expected_weights(name, seed, **params)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    trained = case(seed)[2].bool()
    assert metrics.to_dict()["correction_weight"] == pytest.approx(float(weights[trained].mean()))


def test_fraction_of_changed_weights() -> None:
    rollout = torch.zeros(5, dtype=torch.float64)
    old = torch.tensor([1.0, 0.2, 5.0, 1.5, 9.0], dtype=torch.float64).log()
    mask = torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64)
    # 5 > cap; 0.2 < low, and 5 is still inside; both are outside
    for name, fraction in (("tis", 1 / 4), ("icepop", 1 / 4), ("mis", 2 / 4)):
        entry = corrections.get(name)
        _, metrics = entry.function(rollout, old, mask, torch.tensor([5]), entry.params())
        assert metrics.to_dict()["correction_clipfrac"] == fraction


def test_sequences_are_masked_as_wholes() -> None:
    """Both levels drop a sequence of many small deviations or of one large one; tokens apart would be kept."""
    lengths = torch.tensor([20, 20, 20])
    old = torch.zeros(60, dtype=torch.float64)
    old[:20] = 0.05  # product e, geometric mean 1.05
    old[25] = 0.6  # product 1.8, geometric mean 1.03
    mask, rollout = torch.ones(60, dtype=torch.float64), torch.zeros(60, dtype=torch.float64)
    entry = corrections.get("mis")
    for level, high, kept in (("token", 2.0, [1, 1, 1]), ("sequence", 2.0, [0, 1, 1]), ("geometric", 1.04, [0, 1, 1])):
        weights, metrics = entry.function(
            rollout, old, mask, lengths, entry.params(level=level, high=high, weight="one", low=0.9)
        )
        assert weights.view(3, 20).unique(dim=1).squeeze(1).tolist() == kept
        assert metrics.to_dict()["correction_clipfrac"] == pytest.approx(1 - sum(kept) / 3)


@pytest.mark.parametrize("name", ["icepop", "mis"])
def test_bounds_must_be_ordered(name: str) -> None:
    with pytest.raises(ValidationError, match="must not exceed"):
        corrections.get(name).params(low=2, high=1)


@pytest.mark.parametrize("seed", range(5))
def test_mismatch_of_sampler_and_trainer(seed: int) -> None:
    rollout, old, mask = case(seed)
    trained = mask.bool().numpy()
    x, y = rollout.numpy()[trained], old.numpy()[trained]
    ratio = np.exp(y - x)
    expected = {
        "rollout_kl": np.mean(x - y),
        "rollout_kl_k3": np.mean(ratio - (y - x) - 1),
        "rollout_prob_diff": np.mean(np.abs(np.exp(y) - np.exp(x))),
        "rollout_ratio_max": ratio.max(),
        "rollout_clipfrac": np.mean(ratio > 2),
        "rollout_maskfrac": np.mean((ratio < 0.5) | (ratio > 2)),
    }
    measured = mismatch_metrics(rollout, old, mask).to_dict()
    # of so few tokens these are the smallest and the largest
    assert measured.pop("rollout_log_ratio_p001") == pytest.approx((y - x).min(), rel=0.065)
    assert measured.pop("rollout_log_ratio_p999") == pytest.approx((y - x).max(), rel=0.065)
    assert measured == pytest.approx(expected, rel=1e-9)


def test_mismatch_of_equal_logprobs_is_none() -> None:
    rollout, _, mask = case(0)
    measured = mismatch_metrics(rollout, rollout, mask).to_dict()
    assert measured == pytest.approx({name: float(name == "rollout_ratio_max") for name in measured}, abs=1e-12)


def test_mismatch_merges_over_micro_batches() -> None:
    rollout, old, mask = case(7)
    whole = mismatch_metrics(rollout, old, mask).to_dict()
    assert 0 < mismatch_metrics(rollout, rollout - 0.5 * mask, mask).to_dict()["rollout_ratio_max"] < 1
    parts = [mismatch_metrics(rollout[cut], old[cut], mask[cut]) for cut in (slice(0, 2), slice(2, 2), slice(2, 13))]
    assert Metrics.merge(parts).to_dict() == pytest.approx(whole, rel=1e-12)


def test_without_trained_tokens_there_is_no_mismatch() -> None:
    nothing = mismatch_metrics(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    assert nothing.to_dict() == {"rollout_ratio_max": 0.0}
