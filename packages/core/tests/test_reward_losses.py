"""Losses of reward models: values of independent formulas, and the same gradient however a mini-batch is divided."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlcore.algorithms.reward_models import RewardObjective, RewardObjectiveSettings
from rlcore.batch import Batch, Jagged
from rlcore.errors import BatchError
from rlcore.metrics import Metrics


def objective(loss: Any) -> RewardObjective:
    return RewardObjective(RewardObjectiveSettings(loss=loss))


def pairs(seed: int, count: int = 6, scale: float = 1.0) -> tuple[Batch, torch.Tensor]:
    """Pairs in no order, each side scored at its last token, and scores ``[T]`` of every token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2 * count,), generator=generator)
    total = int(lengths.sum())
    mask = torch.zeros(total)
    mask[lengths.cumsum(0) - 1] = 1
    batch = Batch(
        {
            "tokens": Jagged(torch.ones(total, dtype=torch.int64), lengths),
            "loss_mask": Jagged(mask, lengths),
            "values": Jagged(torch.randn(total, generator=generator) * scale, lengths),
            "pair": torch.randperm(5 * count, generator=generator)[:count].repeat_interleave(2),
            "side": torch.tensor([0, 1]).repeat(count),
            "margin": torch.rand(count, generator=generator).repeat_interleave(2),
        }
    ).take(torch.randperm(2 * count, generator=generator))
    return batch, batch.flat("values")


def steps(seed: int, count: int = 6) -> tuple[Batch, torch.Tensor]:
    """Answers of which some tokens have a label from 0 to 1, and scores ``[T]`` of every token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator)
    total = int(lengths.sum())
    mask = (torch.rand(total, generator=generator) < 0.4).float()
    labels = torch.where(mask.bool(), torch.rand(total, generator=generator), math.nan)
    columns = {"tokens": torch.ones(total, dtype=torch.int64), "loss_mask": mask, "labels": labels}
    batch = Batch({name: Jagged(values, lengths) for name, values in columns.items()})
    return batch, torch.randn(total, generator=generator)


def evaluate(
    found: RewardObjective, batch: Batch, values: torch.Tensor, sums: dict[str, float] | None = None
) -> tuple[float, torch.Tensor, Metrics]:
    """Loss, its gradient with respect to the scores, metrics."""
    leaf = values.clone().requires_grad_()
    loss, metrics = found.loss({"values": leaf}, batch, found.denominators(batch) if sums is None else sums)
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad, metrics


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("centering", [0.0, 0.3])
def test_bradley_terry_is_the_mean_over_pairs(smoothing: float, centering: float) -> None:
    loss = {"name": "bradley_terry", "label_smoothing": smoothing, "centering": centering}
    batch, values = pairs(0)
    found, _, metrics = evaluate(objective(loss), batch, values)
    sides: dict[int, dict[int, float]] = {}
    margins: dict[int, float] = {}
    for row, pair, side, margin in zip(batch["values"].to_list(), batch["pair"], batch["side"], batch["margin"]):
        sides.setdefault(int(pair), {})[int(side)] = float(row[-1])
        margins[int(pair)] = float(margin)
    expected = []
    for pair, scores in sides.items():
        p = 1 / (1 + math.exp(-(scores[0] - scores[1] - margins[pair])))
        centred = centering * (scores[0] + scores[1]) ** 2
        expected.append(-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p) + centred)
    assert found == pytest.approx(sum(expected) / 6, rel=1e-6)
    measured = metrics.to_dict()
    assert measured["loss"] == pytest.approx(found)
    assert measured["accuracy"] == sum(scores[0] > scores[1] for scores in sides.values()) / 6
    assert measured["margin"] == pytest.approx(sum(scores[0] - scores[1] for scores in sides.values()) / 6)
    assert measured["score_chosen"] == pytest.approx(sum(scores[0] for scores in sides.values()) / 6)


def test_a_model_that_knows_nothing_has_the_loss_of_a_coin() -> None:
    batch, values = pairs(1)
    batch = batch.with_columns(margin=torch.zeros(12))
    assert evaluate(objective("bradley_terry"), batch, torch.zeros_like(values))[0] == pytest.approx(math.log(2))


def test_regression_is_the_mean_over_labelled_tokens() -> None:
    batch, values = steps(0)
    scored = [(float(s), float(y)) for s, y in zip(values, batch.flat("labels")) if not math.isnan(y)]
    squares = [(s - y) ** 2 for s, y in scored]
    assert evaluate(objective("mse"), batch, values)[0] == pytest.approx(sum(squares) / len(scored), rel=1e-6)
    entropies = [y * math.log(1 + math.exp(-s)) + (1 - y) * math.log(1 + math.exp(s)) for s, y in scored]
    loss, _, metrics = evaluate(objective("bce"), batch, values)
    assert loss == pytest.approx(sum(entropies) / len(scored), rel=1e-6)
    assert metrics.to_dict()["accuracy"] == sum((s > 0) == (y > 0.5) for s, y in scored) / len(scored)


@pytest.mark.parametrize("name", ["bradley_terry", "mse", "bce"])
def test_the_gradient_is_that_of_the_whole_mini_batch_however_it_is_divided(name: str) -> None:
    batch, values = pairs(2, 8) if name == "bradley_terry" else steps(2, 16)
    batch = batch.with_columns(values=batch.jagged(values))
    found = objective(name)
    loss, gradient, metrics = evaluate(found, batch, values)
    for budget in (1, 12, 30):
        parts = batch.micro_batches(budget, found.request.together)
        assert len(parts) > 1 or budget == 30
        shares = [
            evaluate(found, part, part.flat("values"), found.denominators(batch)) for part in map(batch.take, parts)
        ]
        assert sum(share[0] for share in shares) == pytest.approx(loss, rel=1e-6)
        order = torch.tensor([index for part in parts for index in part])
        together = torch.cat([share[1] for share in shares])
        torch.testing.assert_close(together, batch.jagged(gradient).take(order).values, rtol=0, atol=1e-7)
        merged = Metrics.merge(share[2] for share in shares).to_dict()
        assert merged == pytest.approx(metrics.to_dict(), rel=1e-6)


@pytest.mark.parametrize("name", ["bradley_terry", "bce"])
@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e6])
def test_extreme_scores_have_finite_gradients(name: str, scale: float) -> None:
    batch, values = pairs(3, scale=scale) if name == "bradley_terry" else steps(3)
    loss, gradient, _ = evaluate(objective(name), batch, values if name == "bradley_terry" else values * scale)
    assert math.isfinite(loss)
    assert bool(gradient.isfinite().all())


def test_only_scored_tokens_have_a_gradient() -> None:
    for name, (batch, values) in {"bradley_terry": pairs(4), "bce": steps(4)}.items():
        masked = batch.flat("loss_mask") == 0
        _, gradient, _ = evaluate(objective(name), batch, torch.where(masked, 1e30, values))
        assert bool((gradient[masked] == 0).all())
        assert bool((gradient[~masked] != 0).all())


def test_missing_columns_and_torn_pairs_are_errors() -> None:
    batch, values = pairs(5)
    with pytest.raises(BatchError, match="needs the column 'labels'"):
        evaluate(objective("mse"), batch, values)
    with pytest.raises(BatchError, match="a pair is not one chosen and one rejected score"):
        evaluate(objective("bradley_terry"), batch.take(range(3)), batch.take(range(3)).flat("values"))
    with pytest.raises(ValidationError, match="label_smoothing"):
        objective({"name": "bradley_terry", "label_smoothing": 0.5})
    assert pickle.loads(pickle.dumps(objective("bce"))) == objective("bce")


def test_several_outputs_are_the_mean_over_all_labels() -> None:
    """Each output is trained on its own labels, however many there are."""
    batch, _ = steps(4, count=9)
    generator = torch.Generator().manual_seed(5)
    labels = batch.flat("labels")[:, None].repeat(1, 3) * torch.tensor([1.0, 0.5, 0.25])
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = math.nan
    values = torch.randn(labels.shape, generator=generator)
    both = batch.with_columns(labels=batch.jagged(labels))
    several = RewardObjective(RewardObjectiveSettings(loss="mse"), outputs=("a", "b", "c"))
    loss, gradient, metrics = evaluate(several, both, values)
    labelled = ~labels.isnan()
    counts = labelled.sum(0)
    error = torch.where(labelled, (values - labels).double(), 0.0)
    assert loss == pytest.approx(float(error.square().sum() / labelled.sum()))
    torch.testing.assert_close(gradient, (2 * error / labelled.sum()).float())
    found = metrics.to_dict()
    for index, name in enumerate("abc"):
        assert found[f"{name}/absolute_error"] == pytest.approx(float((error.abs().sum(0) / counts)[index]))
    assert found["absolute_error"] == pytest.approx(float(error.abs().sum() / labelled.sum()))
