"""Loss aggregations against plain loops, and their shares over micro-batches."""

from __future__ import annotations

import math
import random

import pytest
import torch
from pydantic import ValidationError

from rlcore.algorithms import aggregations
from rlcore.algorithms.aggregation import denominators
from rlcore.algorithms.objectives import PolicyObjectiveSettings, SFTObjective, SFTObjectiveSettings
from rlcore.batch import Batch, Jagged

MAX_LENGTH = 13


def loops(name: str, rows: list[list[float]], masks: list[list[bool]]) -> float:
    kept = [[x for x, m in zip(row, mask) if m] for row, mask in zip(rows, masks)]
    kept = [row for row in kept if row]
    if not kept:
        return 0.0
    if name == "token-mean":
        return sum(map(sum, kept)) / sum(map(len, kept))
    per_sequence = {
        "seq-mean-token-sum": lambda row: sum(row),
        "seq-mean-token-mean": lambda row: sum(row) / len(row),
        "seq-mean-token-sum-norm": lambda row: sum(row) / MAX_LENGTH,
    }[name]
    return sum(map(per_sequence, kept)) / len(kept)


NAMES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def test_every_aggregation_has_an_oracle() -> None:
    assert {entry.name for entry in aggregations} >= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(20))
def test_aggregation(name: str, seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 3, 8]) for _ in range(rng.randint(0, 6))]
    rows = [[rng.gauss(0, 1) for _ in range(n)] for n in lengths]
    masks = [[t > 0 and rng.random() < 0.6 for t in range(n)] for n in lengths]
    size = torch.tensor(lengths, dtype=torch.int64)
    mask = torch.tensor([float(m) for row in masks for m in row], dtype=torch.float64)
    losses = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    losses = losses.masked_fill(mask == 0, math.nan).requires_grad_()

    sums = denominators(Batch({"loss_mask": Jagged(mask, size)}))
    assert sums == {"tokens": mask.sum(), "sequences": sum(any(m) for m in masks)}
    entry = aggregations.get(name)
    params = entry.params(max_length=MAX_LENGTH) if name.endswith("norm") else entry.params()
    total = entry.function(losses, mask, size, sums, params)
    assert float(total.detach()) == pytest.approx(loops(name, rows, masks), rel=1e-12, abs=1e-12)
    total.backward()
    assert losses.grad is not None
    assert losses.grad.isfinite().all()

    cut = rng.randint(0, len(lengths))  # two micro-batches
    tokens = sum(lengths[:cut])
    shares = [
        entry.function(losses[:tokens], mask[:tokens], size[:cut], sums, params),
        entry.function(losses[tokens:], mask[tokens:], size[cut:], sums, params),
    ]
    assert float(sum(shares).detach()) == pytest.approx(float(total.detach()), rel=1e-12, abs=1e-12)


def test_constant_length_must_be_given() -> None:
    with pytest.raises(ValidationError, match="max_length"):
        PolicyObjectiveSettings(aggregation="seq-mean-token-sum-norm")


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_trajectory_are_one_sequence(name: str) -> None:
    """Two trajectories of two rows and of one, against the same tokens in two rows; in two micro-batches."""
    lengths, whole = torch.tensor([4, 3, 3]), torch.tensor([7, 3])
    mask = torch.tensor([0, 1, 1, 1, 0, 0, 1, 0, 1, 1.0], dtype=torch.float64)
    logprobs = torch.arange(10, dtype=torch.float64)
    rows = Batch({"loss_mask": Jagged(mask, lengths), "trajectory_tokens": torch.tensor([4, 4, 2])})
    one = rows.resequenced(whole, [0, 2]).select("loss_mask")
    choice = {"name": name, "max_length": MAX_LENGTH} if name.endswith("norm") else name
    objective = SFTObjective(SFTObjectiveSettings(aggregation=choice))
    sums = objective.denominators(rows)
    assert sums == objective.denominators(one) == {"tokens": 6, "sequences": 2}
    parts = [(rows.slice(0, 1), logprobs[:4]), (rows.slice(1, 3), logprobs[4:])]
    found = sum(float(objective.loss({"logprobs": values}, part, sums)[0]) for part, values in parts)
    assert found == pytest.approx(float(objective.loss({"logprobs": logprobs}, one, sums)[0]))
