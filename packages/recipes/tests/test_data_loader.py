"""Order, resumption and mixing of batches."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcore.batch import Batch, Jagged
from rlcore.engines.episode import PromptSample
from rlcore.errors import CheckpointError, DataError
from rlcore_recipes.data.loader import BatchLoader, PromptLoader
from rlcore_recipes.data.prompts import PromptDataset


def dataset(*sizes: int) -> PromptDataset:
    return PromptDataset([PromptSample([i], [], index=i, position=i) for i in range(sum(sizes))], list(sizes))


def indices(batch: list[PromptSample]) -> list[int]:
    return [sample.index for sample in batch]


@st.composite
def loaders(draw: st.DrawFn) -> dict:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    weights = draw(st.none() | st.lists(st.floats(0.1, 5), min_size=len(sizes), max_size=len(sizes)))
    return {
        "sizes": sizes,
        "batch_size": draw(st.integers(1, sum(sizes))),
        "seed": draw(st.integers(0, 3)),
        "shuffle": draw(st.booleans()),
        "weights": weights,
    }


def make(sizes: list[int], batch_size: int, **options: object) -> PromptLoader:
    return PromptLoader(dataset(*sizes), batch_size, **options)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(loaders(), st.integers(0, 12))
def test_resumed_loader_goes_on_as_the_uninterrupted_one(options: dict, stop: int) -> None:
    whole = make(**options)
    batches = [next(whole) for _ in range(stop + 5)]
    first = make(**options)
    for _ in range(stop):
        next(first)
    second = make(**options)
    second.restore(json.loads(json.dumps(first.state())))
    assert [next(second) for _ in range(5)] == batches[stop:]
    assert second.epoch == whole.epoch


@settings(deadline=None, max_examples=60)
@given(loaders())
def test_positions_count_all_samples_of_the_run(options: dict) -> None:
    loader = make(**options)
    positions = [sample.position for _ in range(7) for sample in next(loader)]
    assert positions == list(range(7 * options["batch_size"]))


def test_every_epoch_uses_samples_once_and_in_another_order() -> None:
    loader = PromptLoader(dataset(12), 4)
    epochs = [[index for _ in range(loader.steps_per_epoch) for index in indices(next(loader))] for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_unshuffled_order_is_that_of_the_file_and_drops_the_rest() -> None:
    loader = PromptLoader(dataset(7), 3, shuffle=False)
    assert loader.steps_per_epoch == 2
    assert [indices(next(loader)) for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert loader.epoch == 1


def test_order_depends_on_the_seed_and_not_on_global_generators() -> None:
    torch.manual_seed(1)
    first = indices(next(PromptLoader(dataset(50), 50, seed=3)))
    torch.manual_seed(2)
    torch.rand(5)
    assert indices(next(PromptLoader(dataset(50), 50, seed=3))) == first
    assert indices(next(PromptLoader(dataset(50), 50, seed=4))) != first


def test_weights_divide_an_epoch_and_go_through_every_file_evenly() -> None:
    loader = PromptLoader(dataset(30, 10), 10, weights=[1, 3])
    drawn = [[index for _ in range(4) for index in indices(next(loader))] for _ in range(3)]
    for epoch in drawn:
        assert sum(index >= 30 for index in epoch) == 30
    counts = Counter(index for epoch in drawn for index in epoch)
    assert {counts[index] for index in range(30)} == {1}  # three epochs of ten draws pass once over the file of 30
    assert {counts[index] for index in range(30, 40)} == {9}


def test_too_large_a_batch_names_both_numbers() -> None:
    with pytest.raises(DataError, match=r"data\.train_batch_size=8 is more than the 5 samples"):
        PromptLoader(dataset(5), 8)


def test_restoring_over_other_data_is_an_error() -> None:
    state = PromptLoader(dataset(5), 2, seed=1).state()
    with pytest.raises(CheckpointError, match=r"seed was 1 and is now 0; file_sizes was \[5\] and is now \[6\]"):
        PromptLoader(dataset(6), 2).restore(state)


def test_restoring_over_as_many_other_samples_is_an_error() -> None:
    loaders = [
        PromptLoader(PromptDataset(dataset(5).samples, [2, 3], fingerprints=["file", second]), 2)
        for second in ("aa", "aa", "bb")
    ]
    loaders[1].restore(loaders[0].state())
    with pytest.raises(CheckpointError, match=r"train file 2 .* as many samples as before"):
        loaders[2].restore(loaders[0].state())


def test_batch_loader_takes_rows_of_the_batch() -> None:
    data = Batch({"tokens": Jagged.from_list([[i] * (i + 1) for i in range(6)]), "name": [str(i) for i in range(6)]})
    batch = next(BatchLoader(data, [6], 4, seed=1))
    assert len(set(batch["name"])) == 4
    assert [row.tolist() for row in batch["tokens"].to_list()] == [[int(n)] * (int(n) + 1) for n in batch["name"]]
