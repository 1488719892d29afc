"""The shift between tokens and predictions, against loops over whole sequences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlcore.batch import predicted_positions, predicting_states, scatter_predictions
from rlcore.errors import BatchError

lengths_lists = st.lists(st.integers(0, 4), max_size=6)


def oracle(lengths: list[int], mask: list[float]) -> list[int]:
    positions, start = [], 0
    for length in lengths:
        # token 0 of a sequence is predicted by nothing
        positions += [start + t for t in range(1, length) if mask[start + t]]
        start += length
    return positions


@given(lengths_lists, st.data())
def test_positions(lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths)
    mask = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=total, max_size=total))
    given = torch.tensor(lengths, dtype=torch.int64)
    for kind in (torch.float32, torch.int64, torch.bool) if 0.5 not in mask else (torch.float32, torch.bool):
        values = torch.tensor(mask).to(kind)
        assert predicted_positions(given, values).tolist() == oracle(lengths, mask)
        assert torch.equal(values, torch.tensor(mask).to(kind))  # the mask is left alone
    assert predicted_positions(given).tolist() == oracle(lengths, [1.0] * total)
    assert predicted_positions(given).dtype == torch.int64


def test_an_empty_sequence_at_the_end_has_no_start() -> None:
    assert predicted_positions(torch.tensor([0, 3, 0, 0])).tolist() == [1, 2]
    assert predicted_positions(torch.tensor([0, 0])).tolist() == []
    assert predicted_positions(torch.tensor([], dtype=torch.int64)).tolist() == []


@given(lengths_lists)
def test_there_and_back(lengths: list[int]) -> None:
    """Give position *p* of each sequence the state "I stand before p + 1"; what comes back must say "p"."""
    own = [t for length in lengths for t in range(length)]
    states = torch.tensor([[t + 1.0, -t - 1.0] for t in own]).reshape(-1, 2)
    positions = predicted_positions(torch.tensor(lengths, dtype=torch.int64))
    column = scatter_predictions(predicting_states(states, positions), positions, len(own))
    assert column.tolist() == [[float(t), -float(t)] for t in own]  # 0 at each first token


def test_gradients_reach_the_states_that_predicted() -> None:
    states = torch.zeros(5, requires_grad=True)
    positions = predicted_positions(torch.tensor([3, 2]), torch.tensor([1, 0, 1, 1, 1]))
    column = scatter_predictions(predicting_states(states, positions), positions, 5)
    (column * torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])).sum().backward()
    assert states.grad is not None
    assert states.grad.tolist() == [0, 100, 0, 10000, 0]


def test_a_mask_of_another_size() -> None:
    with pytest.raises(BatchError, match=r"the mask has shape \[4\] but the sequences have 5 tokens"):
        predicted_positions(torch.tensor([3, 2]), torch.ones(4))
