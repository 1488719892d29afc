"""Dividing sequences among ranks and micro-batches."""

import heapq
import random
import time
import tracemalloc
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcore.batch import balanced_partitions, micro_batches
from rlcore.errors import BatchError

lengths_lists = st.lists(st.integers(0, 50), max_size=30)


def loads(lengths: list[int], parts: list[list[int]]) -> list[int]:
    return [sum(lengths[i] for i in part) for part in parts]


def heavy_tailed(n: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [min(int(draw.lognormvariate(6, 1)), 16384) for _ in range(n)]


@given(lengths_lists, st.integers(1, 9))
def test_partitions_hold_every_index_once_and_leave_no_rank_empty(lengths: list[int], parts: int) -> None:
    found = balanced_partitions(lengths, parts)
    assert len(found) == parts
    assert sorted(i for part in found for i in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in found)
    assert sum(bool(part) for part in found) == min(parts, len(lengths))
    assert found == balanced_partitions(lengths, parts)


@given(lengths_lists, st.integers(1, 9))
def test_no_two_ranks_differ_by_more_than_the_longest_sequence(lengths: list[int], parts: int) -> None:
    spread = loads(lengths, balanced_partitions(lengths, parts))
    assert max(spread) - min(spread) <= max(lengths, default=0)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 5))
def test_equal_sequences_are_counted_out(n: int, parts: int, length: int) -> None:
    counts = [len(part) for part in balanced_partitions([length] * n, parts)]
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(2, 3))
def test_close_to_the_best_of_all_divisions(lengths: list[int], parts: int) -> None:
    """Against brute force; largest differencing stays within 4/3 of the optimum (Michiels, Korst & Aarts, 2003)."""
    best = min(
        max(sum(n for n, rank in zip(lengths, ranks) if rank == r) for r in range(parts))
        for ranks in product(range(parts), repeat=len(lengths))
    )
    assert max(loads(lengths, balanced_partitions(lengths, parts))) <= best * 4 / 3


@pytest.mark.parametrize(("n", "parts"), [(64, 8), (128, 8), (512, 8), (1024, 64)])
def test_evener_than_longest_first(n: int, parts: int) -> None:
    """The reason for largest differencing: on heavy-tailed lengths it beats greedy on average (here over 10 draws)."""
    ours = greedy = 0.0
    for seed in range(10):
        lengths = heavy_tailed(n, seed)
        floor = max(sum(lengths) / parts, max(lengths))
        ours += max(loads(lengths, balanced_partitions(lengths, parts))) / floor / 10
        ranks = [0] * parts
        for length in sorted(lengths, reverse=True):
            heapq.heapreplace(ranks, ranks[0] + length)
        greedy += max(ranks) / floor / 10
    assert ours < greedy
    assert ours < 1.005


@given(lengths_lists, st.integers(1, 60))
def test_micro_batches_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    found = micro_batches(lengths, budget)
    assert sorted(i for part in found for i in part) == list(range(len(lengths)))
    for part in found:
        assert part == sorted(part)
        assert sum(lengths[i] for i in part) <= budget or len(part) == 1
    assert found == micro_batches(lengths, budget)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=40), st.integers(1, 60), st.integers(1, 4))
def test_units_are_never_divided(samples: list[tuple[int, int]], budget: int, parts: int) -> None:
    lengths, units = [length for length, _ in samples], [unit for _, unit in samples]
    for found in (micro_batches(lengths, budget, units), balanced_partitions(lengths, parts, units)):
        assert sorted(i for part in found for i in part) == list(range(len(lengths)))
        assert all(part == sorted(part) for part in found)
        homes = [{units[i] for i in part} for part in found]
        assert sum(map(len, homes)) == len(set(units)), "a unit is in two parts"
    for part in micro_batches(lengths, budget, units):
        assert sum(lengths[i] for i in part) <= budget or len({units[i] for i in part}) == 1


@given(lengths_lists, st.integers(50, 100))
def test_micro_batches_are_few(lengths: list[int], budget: int) -> None:
    """No two could be merged, hence fewer than twice as many as the tokens need (+ 1)."""
    found = sorted(loads(lengths, micro_batches(lengths, budget)))
    assert all(a + b > budget for a, b in pairwise(found))
    assert len(found) <= max(1, 2 * -(-sum(lengths) // budget))


def test_the_micro_batch_with_the_longest_sequence_comes_first() -> None:
    assert micro_batches([3, 10, 4, 6, 7], 10) == [[1], [0, 4], [2, 3]]


@pytest.mark.parametrize("budget", [600, 4096, 16384])
def test_micro_batches_of_many_sequences_are_quick(budget: int) -> None:
    """First-fit over a list takes 5 s and more for the smallest budget; this some hundredths."""
    lengths = heavy_tailed(20_000, 0)
    start = time.process_time()
    micro_batches(lengths, budget)
    assert time.process_time() - start < 1.5


@given(lengths_lists, st.integers(1, 9))
def test_largest_differencing_by_its_definition(lengths: list[int], parts: int) -> None:
    """Against the textbook's form, in which every division has all its parts, empty ones too."""
    divisions = [(length, -index, [(length, 1)] + [(0, 0)] * (parts - 1)) for index, length in enumerate(lengths)]
    while len(divisions) > 1:
        divisions.sort()
        _, _, heavy = divisions.pop()
        _, age, light = divisions.pop()
        merged = sorted(((a + b, n + m) for (a, n), (b, m) in zip(heavy, light[::-1])), reverse=True)
        divisions.append((merged[0][0] - merged[-1][0], age, merged))
    expected = divisions[0][2] if divisions else [(0, 0)] * parts
    found = balanced_partitions(lengths, parts)
    assert [(sum(lengths[i] for i in part), len(part)) for part in found] == expected


@pytest.mark.parametrize(("n", "parts"), [(512, 64), (4096, 64), (4096, 200), (65_536, 512)])
def test_heavy_tails_are_even_to_two_percent(n: int, parts: int) -> None:
    """Wherever it is possible: no sequence is longer than the mean load, or that sequence alone is the fullest rank."""
    lengths = heavy_tailed(n, 3)
    fullest = max(loads(lengths, balanced_partitions(lengths, parts)))
    assert fullest <= max(1.02 * sum(lengths) / parts, max(lengths))


def test_memory_does_not_grow_with_sequences_times_ranks() -> None:
    """One number for each sequence and rank would be 200 MB and more."""
    lengths = heavy_tailed(50_000, 0)
    tracemalloc.start()
    try:
        balanced_partitions(lengths, 512)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_errors() -> None:
    with pytest.raises(BatchError, match="into 0 parts"):
        balanced_partitions([1], 0)
    with pytest.raises(BatchError, match="of 0 tokens"):
        micro_batches([1], 0)
