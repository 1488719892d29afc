"""The critic's loss against its formula in loops and by gradcheck, and its explained variance."""

from __future__ import annotations

import random
from statistics import variance

import pytest
import torch

from rlcore.algorithms import value_losses
from rlcore.algorithms.value_loss import explained_variance
from rlcore.batch import Batch, Jagged


def case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(20, generator=generator) < 0.7).double()
    values, old, returns = torch.randn(3, 20, generator=generator, dtype=torch.float64) * mask
    return values.requires_grad_(), old, returns, mask


@pytest.mark.parametrize("clip_range", [0.5, 0.05, None])
@pytest.mark.parametrize("seed", range(5))
def test_clipped_value_loss(clip_range: float | None, seed: int) -> None:
    values, old, returns, mask = case(seed)
    entry = value_losses.get("clipped")
    losses, metrics = entry.function(values, old, returns, mask, entry.params(clip_range=clip_range))
    expected, clipped = [], []
    for v, v_old, target in zip(values.tolist(), old.tolist(), returns.tolist()):
        squares = [(v - target) ** 2]
        if clip_range is not None:
            squares.append((min(max(v, v_old - clip_range), v_old + clip_range) - target) ** 2)
        expected.append(max(squares) / 2)
        clipped.append(squares[-1] > squares[0])
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)

    trained = mask.bool().tolist()
    measured = metrics.to_dict()
    count = sum(trained)
    assert measured["vpred_mean"] == pytest.approx(float(values.detach().sum()) / count)
    if clip_range is None:
        assert "vf_clipfrac" not in measured
    else:
        assert measured["vf_clipfrac"] == pytest.approx(sum(c for c, t in zip(clipped, trained) if t) / count)


@pytest.mark.parametrize("clip_range", [0.5, None])
def test_clipped_value_loss_gradient(clip_range: float | None) -> None:
    values, old, returns, mask = case(1)
    entry = value_losses.get("clipped")
    params = entry.params(clip_range=clip_range)
    assert torch.autograd.gradcheck(lambda v: entry.function(v, old, returns, mask, params)[0], (values,))


def test_explained_variance() -> None:
    rng = random.Random(0)
    returns = [rng.gauss(0, 1) for _ in range(6)]
    values = [r + rng.gauss(0, 0.3) for r in returns]
    lengths = torch.tensor([4, 4])

    def batch(values: list[float], returns: list[float]) -> Batch:
        def column(rows: list[float]) -> Jagged:  # the first token of each sequence is predicted by nothing
            return Jagged(torch.tensor([99.0, *rows[:3], -99.0, *rows[3:]], dtype=torch.float64), lengths)

        return Batch(
            {"loss_mask": Jagged(torch.ones(8), lengths), "values": column(values), "returns": column(returns)}
        )

    errors = [r - v for r, v in zip(returns, values)]
    assert explained_variance(batch(values, returns)) == pytest.approx(1 - variance(errors) / variance(returns))
    assert explained_variance(batch(returns, returns)) == 1
    assert explained_variance(batch(values, [0.5] * 6)) == 0
