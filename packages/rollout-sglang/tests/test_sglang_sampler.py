"""The sampling backend that runs inside of servers, without one."""

from types import SimpleNamespace

import pytest
import torch

from rlcore_sglang.sampler import draw, filtered, uniform

EVERYTHING = 1 << 30


def wanted(rows: int, seeds=None, top_k=EVERYTHING, top_p=1.0, min_p=0.0, filters=True):
    return SimpleNamespace(
        top_ks=torch.full((rows,), top_k),
        top_ps=torch.full((rows,), top_p),
        min_ps=torch.full((rows,), min_p),
        sampling_seed=torch.arange(rows) if seeds is None else seeds,
        need_top_k_sampling=filters,
        need_top_p_sampling=False,
        need_min_p_sampling=False,
    )


def test_numbers_are_uniform_and_independent():
    count = 100_000
    many = torch.arange(count)
    by_seed, by_position = uniform(many, torch.full_like(many, 7)), uniform(torch.full_like(many, 7), many)
    for numbers in (by_seed, by_position, uniform(many - (1 << 62), many)):
        assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
        counts = torch.histc(numbers, 50, 0, 1)
        assert float(((counts - count / 50) ** 2 / (count / 50)).sum()) < 100  # 49 degrees of freedom: 1e-5
        assert abs(float(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([by_seed, by_position]))[0, 1])) < 0.02


def test_filters_in_order():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])

    def kept(top_k=EVERYTHING, top_p=1.0, min_p=0.0) -> list[int]:
        row = filtered(probs, torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))[0]
        assert torch.equal(row[row > 0], probs[0][row > 0])
        return row.nonzero()[:, 0].tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.6) == [1, 3]
    assert kept(top_k=2, top_p=0.5) == [1]  # half of what top-k left
    assert kept(min_p=0.6) == [1, 3]
    assert kept(top_p=1e-9) == kept(min_p=1.0) == kept(top_k=1) == [1]


def test_a_row_that_filters_nothing_comes_back_whole_and_draws_the_same():
    probs = torch.rand(64, 300).softmax(-1)
    positions = torch.arange(64)
    alone = draw(probs, wanted(64, filters=False), positions)
    assert torch.equal(draw(probs, wanted(64), positions), alone)
    shuffled = torch.randperm(64)
    assert torch.equal(draw(probs[shuffled], wanted(64, shuffled), positions[shuffled]), alone[shuffled])


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}], ids=str)
def test_tokens_follow_the_distribution(changes):
    rows = 20_000
    probs = (torch.arange(12).float() / 3).softmax(-1).expand(rows, -1)
    choice = wanted(rows, **changes)
    counts = torch.bincount(draw(probs, choice, torch.full((rows,), 3)), minlength=12)
    expected = filtered(probs[:1], choice.top_ks[:1], choice.top_ps[:1], choice.min_ps[:1])[0]
    expected = expected / expected.sum() * rows
    assert int(counts[expected == 0].sum()) == 0
    frequent = expected > 0
    statistic = float(((counts - expected)[frequent] ** 2 / expected[frequent]).sum())
    assert statistic < 45  # 11 degrees of freedom: 5e-6
