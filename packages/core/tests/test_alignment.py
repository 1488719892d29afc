"""The token shift, compared with loops over sequences."""

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlcore.batch import alignment
from rlcore.batch.alignment import last_entries, next_entries, state_positions, to_column, token_positions
from rlcore.errors import BatchError

lengths_lists = st.lists(st.integers(0, 4), max_size=6)


def oracle(lengths: list[int], mask: list[float], first: int) -> list[int]:
    positions, start = [], 0
    for length in lengths:
        positions += [start + t for t in range(first, length) if mask[start + t]]
        start += length
    return positions


def test_the_worked_example_of_the_documentation_is_true() -> None:
    found = doctest.testmod(alignment)
    assert found.attempted > 5
    assert found.failed == 0


@given(lengths_lists, st.data())
def test_tokens_have_an_entry_where_the_mask_is_set_and_a_state_precedes(
    lengths: list[int], data: st.DataObject
) -> None:
    total = sum(lengths)
    mask = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=total, max_size=total))
    given = torch.tensor(lengths, dtype=torch.int64)
    for kind in (torch.float32, torch.int64, torch.bool) if 0.5 not in mask else (torch.float32, torch.bool):
        values = torch.tensor(mask).to(kind)
        assert token_positions(given, values).tolist() == oracle(lengths, mask, first=1)
        assert token_positions(given, values, head="value").tolist() == oracle(lengths, mask, first=1)
        assert token_positions(given, values, head="score").tolist() == oracle(lengths, mask, first=0)
        assert torch.equal(values, torch.tensor(mask).to(kind))  # the mask is not changed
    assert token_positions(given).tolist() == oracle(lengths, [1.0] * total, first=1)
    assert torch.equal(token_positions(given, head="score"), token_positions(given))
    assert token_positions(given).dtype == torch.int64


def test_an_empty_sequence_at_the_end_has_no_first_token() -> None:
    assert token_positions(torch.tensor([0, 3, 0, 0])).tolist() == [1, 2]
    assert token_positions(torch.tensor([0, 0])).tolist() == []
    assert token_positions(torch.tensor([], dtype=torch.int64)).tolist() == []


@given(lengths_lists)
def test_every_entry_is_computed_from_the_state_before_its_token(lengths: list[int]) -> None:
    """The state at *t* is *t + 1*, the number of tokens that it has seen; the entry of token *t* must show *t*."""
    own = [t for length in lengths for t in range(length)]
    states = torch.tensor([t + 1.0 for t in own])
    for head, seen in (("policy", 0), ("value", 0), ("score", 1)):
        mask = torch.ones(len(own))
        positions = token_positions(torch.tensor(lengths, dtype=torch.int64), mask, head=head)  # type: ignore[arg-type]
        chosen = states.index_select(0, state_positions(positions, head=head))  # type: ignore[arg-type]
        column = to_column(torch.stack([chosen, -chosen], -1), positions, len(own))
        assert column.tolist() == [[float(t + seen), -float(t + seen)] for t in own]


def test_gradients_reach_the_states_that_predict() -> None:
    states = torch.zeros(5, requires_grad=True)
    positions = token_positions(torch.tensor([3, 2]), torch.tensor([1, 0, 1, 1, 1]))
    column = to_column(states.index_select(0, state_positions(positions)), positions, 5)
    (column * torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])).sum().backward()
    assert states.grad is not None
    assert states.grad.tolist() == [0, 100, 0, 10000, 0]


def test_the_entry_after_the_last_token_of_a_sequence_is_zero() -> None:
    entries, lengths = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 3, 0, 1, 0])
    assert next_entries(entries, lengths).tolist() == [2.0, 3.0, 0.0, 0.0]
    assert next_entries(torch.zeros(0), torch.tensor([0, 0])).tolist() == []
    assert last_entries(entries, torch.tensor([3, 1])).tolist() == [3.0, 4.0]


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(BatchError, match=r"the mask has shape \[4\] but the sequences have 5 tokens"):
        token_positions(torch.tensor([3, 2]), torch.ones(4))
