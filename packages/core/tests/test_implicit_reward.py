"""Implicit process rewards against loops in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rlcore.algorithms import advantages
from rlcore.algorithms.implicit_reward import ImplicitRewardObjective, pair_accuracy
from rlcore.algorithms.sequences import trained_mask
from rlcore.batch import Batch, Jagged

LENGTHS = torch.tensor([5, 3, 4, 6, 2])
GROUPS = [7, 7, 7, 3, 3]


def sample_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = int(LENGTHS.sum())
    mask = (torch.rand(total, generator=generator) < 0.7).float()
    mask[LENGTHS.cumsum(0) - 1] = 1
    batch = Batch({"loss_mask": Jagged(mask, LENGTHS)})
    rewards = torch.zeros(total)
    rewards[LENGTHS.cumsum(0) - 1] = torch.rand(5, generator=generator)
    columns = {
        name: torch.randn(total, generator=generator) for name in ("process_rewards", "ref_logprobs", "logprobs")
    }
    return batch.with_columns(
        token_rewards=batch.jagged(rewards),
        group=torch.tensor(GROUPS),
        outcome=torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]),
        **{name: batch.jagged(values) for name, values in columns.items()},
    )


def rows(batch: Batch, name: str) -> list[list[float]]:
    """The values of each sample's trained tokens."""
    mask = batch.jagged(trained_mask(batch)).to_list()
    return [values[kept].double().tolist() for values, kept in zip(batch[name].to_list(), mask)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalize", [True, False])
def test_advantages(seed: int, normalize: bool) -> None:
    batch = sample_batch(seed)
    entry = advantages.get("prime")
    params = entry.params(process_coeff=2.0, outcome_coeff=3.0, gamma=0.9, normalize=normalize, whiten=False)
    found = rows(batch.with_columns(found=batch.jagged(entry.function(batch, params).advantages)), "found")
    process, scores = rows(batch, "process_rewards"), [sum(row) for row in rows(batch, "token_rewards")]
    if normalize:
        largest = max(abs(sum(row[start:])) for row in process for start in range(len(row)))
        process = [[value / (largest + 1e-6) for value in row] for row in process]
    means = [sum(row) / len(row) for row in process]
    for i, row in enumerate(process):
        others = [j for j in range(5) if GROUPS[j] == GROUPS[i] and j != i]
        base = sum(means[j] for j in others) / len(others)
        outcome = scores[i] - sum(scores[j] for j in others) / len(others)
        for t, value in enumerate(found[i]):
            togo = sum(0.9**k * (reward - base) for k, reward in enumerate(row[t:]))
            assert value == pytest.approx(2 * togo + 3 * outcome, abs=1e-5)


def test_loss_is_the_cross_entropy_of_outcomes_however_the_batch_is_divided() -> None:
    batch, beta = sample_batch(0), 0.7
    objective = ImplicitRewardObjective(beta)
    expected = 0.0
    for logprobs, reference, outcome in zip(rows(batch, "logprobs"), rows(batch, "ref_logprobs"), batch["outcome"]):
        odds = beta * sum(a - b for a, b in zip(logprobs, reference))
        right = 1 / (1 + math.exp(-odds))
        expected -= math.log(right if outcome else 1 - right) / 5
    gradients = []
    for parts in ([[0, 1, 2, 3, 4]], [[0, 3], [1, 2, 4]], [[0], [1], [2], [3], [4]]):
        whole = objective.denominators(batch)
        loss, gradient = 0.0, torch.zeros(batch.total_tokens)
        for part in parts:
            some = batch.take(part)
            values = some.flat("logprobs").clone().requires_grad_()
            share, metrics = objective.loss({"logprobs": values}, some, whole)
            share.backward()
            loss += float(share.detach())
            assert metrics.to_dict()["loss"] >= 0
            for row, piece in zip(part, some.jagged(values.grad).to_list()):
                start = int(LENGTHS[:row].sum())
                gradient[start : start + len(piece)] = piece
        assert loss == pytest.approx(expected, rel=1e-6)
        gradients.append(gradient)
    assert torch.allclose(gradients[0], gradients[1])
    assert torch.allclose(gradients[0], gradients[2])
    assert not gradients[0][~trained_mask(batch)].any()


def test_confident_rewards_and_masked_values_give_finite_losses_and_gradients() -> None:
    batch = sample_batch(0)
    masked = ~trained_mask(batch)
    wild = (1e4 * batch.flat("logprobs")).masked_fill(masked, math.nan).requires_grad_()
    dirty = batch.with_columns(ref_logprobs=batch.jagged(batch.flat("ref_logprobs").masked_fill(masked, math.inf)))
    loss, _ = ImplicitRewardObjective(1.0).loss({"logprobs": wild}, dirty, {"sequences": 5.0})
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(wild.grad[~masked]).all()


@pytest.mark.parametrize("seed", range(5))
def test_pair_accuracy(seed: int) -> None:
    rng = random.Random(seed)
    group = [rng.choice([1, 2, 5]) for _ in range(12)]
    outcome = [float(rng.random() < 0.5) for _ in group]
    rewards = [rng.choice([-1.0, 0.0, 2.0]) for _ in group]
    ordered, pairs = 0.0, 0
    for i in range(12):
        for j in range(12):
            if group[i] == group[j] and outcome[i] > outcome[j]:
                pairs += 1
                ordered += 1 if rewards[i] > rewards[j] else 0.5 if rewards[i] == rewards[j] else 0
    found = pair_accuracy(torch.tensor(rewards), torch.tensor(outcome), torch.tensor(group))
    assert found == (pytest.approx(ordered / max(pairs, 1)), pairs)
