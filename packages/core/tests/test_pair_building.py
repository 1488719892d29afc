"""Which completions of a prompt become pairs."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from rlcore.algorithms import pair_builders
from rlcore.config import Algorithm


def pairs(name: str, scores: list[float], group: list[int], **params: float) -> list[tuple[int, int]]:
    entry = pair_builders.get(name)
    chosen, rejected = Algorithm(entry, entry.params(**params))(torch.tensor(scores), torch.tensor(group))
    assert chosen.dtype == rejected.dtype == torch.int64
    return list(zip(chosen.tolist(), rejected.tolist()))


SCORES, GROUP = [0.0, 1.0, 0.5, 1.0, 0.2, 0.2, 0.7], [7, 3, 7, 7, 3, 5, 5]


def test_the_best_and_the_worst_of_each_group() -> None:
    assert pairs("best-worst", SCORES, GROUP) == [(1, 4), (6, 5), (3, 0)]
    assert pairs("best-worst", SCORES, GROUP, min_gap=0.6) == [(1, 4), (3, 0)]


def test_every_two_samples_whose_scores_differ() -> None:
    assert sorted(pairs("all-pairs", SCORES, GROUP)) == [(1, 4), (2, 0), (3, 0), (3, 2), (6, 5)]


@pytest.mark.parametrize("name", [entry.name for entry in pair_builders])
def test_pairs_are_of_one_group_and_of_different_scores(name: str) -> None:
    rng = random.Random(0)
    for _ in range(20):
        size = rng.randint(0, 12)
        scores, group = [rng.choice([0.0, 0.5, 1.0]) for _ in range(size)], [rng.randint(0, 3) for _ in range(size)]
        found = pairs(name, scores, group)
        assert all(group[one] == group[other] and scores[one] > scores[other] for one, other in found)
        differ = {
            group[a]
            for a, b in itertools.permutations(range(size), 2)
            if group[a] == group[b] and scores[a] != scores[b]
        }
        assert {group[one] for one, _ in found} == differ


@pytest.mark.parametrize("name", [entry.name for entry in pair_builders])
def test_equal_scores_and_single_samples_give_no_pair(name: str) -> None:
    assert pairs(name, [1.0, 1.0, 0.0], [0, 0, 1]) == []
    assert pairs(name, [], []) == []
