"""Turns: GiGPO against its formula in loops, and turns as sequences."""

from __future__ import annotations

import random
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from rlcore.algorithms.turns import GiGPOParams, gigpo, turn_sequences, turns_of
from rlcore.batch import Batch, Jagged


def episodes(seed: int) -> Batch:
    """Two groups of episodes of up to four turns in three states; some have no turn, and some rewards are on answers of
    tools."""
    rng = random.Random(seed)
    rows: list[dict[str, list[float]]] = []
    for _ in range(rng.randint(1, 9)):
        row: dict[str, list[float]] = {"loss_mask": [0.0], "turn_state": [0]}
        for _ in range(rng.randrange(5)):
            tokens, answer, state = rng.randint(1, 3), rng.randint(1, 2), rng.randrange(3)
            row["loss_mask"] += [1.0] * tokens + [0.0] * answer
            row["turn_state"] += [state] * tokens + [0] * answer
        row["token_rewards"] = [rng.gauss(0, 1) * (rng.random() < 0.4) for _ in row["loss_mask"]]
        row["token_rewards"][0] = 0.0
        rows.append(row)
    columns: dict[str, Any] = {
        name: Jagged.from_list([row[name] for row in rows], torch.int64 if name == "turn_state" else torch.float64)
        for name in ("loss_mask", "turn_state", "token_rewards")
    }
    return Batch({**columns, "group": torch.tensor([rng.randrange(2) for _ in rows])})


def turns_in(row: dict[str, Any]) -> list[tuple[list[int], float]]:
    """The tokens of each turn, and the rewards from its first token to that of the next turn."""
    mask, rewards = row["loss_mask"].tolist(), row["token_rewards"].tolist()
    starts = [t for t in range(1, len(mask)) if mask[t] and not mask[t - 1]]
    spans = list(zip(starts, [*starts[1:], len(mask)]))
    return [([t for t in range(a, b) if mask[t]], sum(rewards[a:b])) for a, b in spans]


def normalised(value: float, others: list[float], normalize_std: bool) -> float:
    sigma = stdev(others) if len(others) > 1 else 0.0
    return (value - mean(others)) / (sigma + 1e-6 if normalize_std else 1.0)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(("gamma", "weight", "normalize_std"), [(0.9, 1.0, True), (1.0, 0.5, False), (0.0, 0.0, True)])
def test_gigpo(seed: int, gamma: float, weight: float, normalize_std: bool) -> None:
    batch = episodes(seed)
    samples = list(batch.rows())
    totals = [float(row["token_rewards"].sum()) for row in samples]
    groups = batch["group"].tolist()
    steps = []  # (episode, tokens, state, discounted return)
    for number, row in enumerate(samples):
        turns = turns_in(row)
        for k, (tokens, _) in enumerate(turns):
            earned = sum(gamma**i * reward for i, (_, reward) in enumerate(turns[k:]))
            steps.append((number, tokens, int(row["turn_state"][tokens[0]]), earned))
    expected = [torch.zeros(len(row["loss_mask"]), dtype=torch.float64) for row in samples]
    for number, tokens, state, earned in steps:
        whole = normalised(totals[number], [t for t, g in zip(totals, groups) if g == groups[number]], normalize_std)
        alike = [e for other, _, s, e in steps if groups[other] == groups[number] and s == state]
        expected[number][tokens] = whole + weight * normalised(earned, alike, normalize_std)
    params = GiGPOParams(gamma=gamma, step_weight=weight, normalize_std=normalize_std)
    found = gigpo(batch, params).advantages
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_turns_as_sequences_keep_their_tokens_and_have_what_they_and_later_ones_earned(
    seed: int, discount: float
) -> None:
    batch = episodes(seed)
    split = turn_sequences(batch, discount)
    assert torch.equal(split.flat("loss_mask"), batch.flat("loss_mask"))
    expected: list[tuple[int, int, float]] = []  # group, trained tokens, score
    for row in batch.rows():
        turns = turns_in(row)
        rewards = [reward for _, reward in turns]
        expected += [
            (int(row["group"]), len(tokens), sum(discount**i * r for i, r in enumerate(rewards[k:])))
            for k, (tokens, _) in enumerate(turns)
        ] or [(int(row["group"]), 0, float(row["token_rewards"].sum()))]
    found = [
        (int(row["group"]), int(row["loss_mask"].sum()), float(row["token_rewards"].sum())) for row in split.rows()
    ]
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert [one[2] for one in found] == pytest.approx([one[2] for one in expected], rel=1e-6, abs=1e-6)
    assert turns_of(split).counts.clamp(max=1).tolist() == [min(one[1], 1) for one in expected]


def test_samples_without_turns_are_compared_and_have_no_advantage() -> None:
    lengths = torch.tensor([2, 3])
    batch = Batch(
        {
            "loss_mask": Jagged(torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]), lengths),
            "token_rewards": Jagged(torch.tensor([0.0, 1.0, 0.0, 0.0, 3.0]), lengths),
            "turn_state": Jagged(torch.zeros(5, dtype=torch.int64), lengths),
            "group": torch.tensor([0, 0]),
        }
    )
    found = gigpo(batch, GiGPOParams(normalize_std=False)).advantages
    assert found.tolist() == [0, 0, 0, 1, 1]
