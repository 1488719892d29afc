"""How calls are divided and put together again, whichever executor does it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlcore import Batch, Jagged, RolloutEngine, TrainEngine
from rlcore.controller.dispatch import (
    Dispatch,
    dispatch,
    dispatch_of,
    first_argument,
    gather,
    partition,
    partition_of_call,
    take,
)
from rlcore.metrics import Metrics
from rlcore_kit.testing.train_engine import PairMargin, WeightedLogprobs, make_pairs


def batch_of(lengths: list[int]) -> Batch:
    tokens = Jagged.from_list([[i] * n for i, n in enumerate(lengths)], dtype=torch.int64)
    return Batch({"tokens": tokens, "index": torch.arange(len(lengths))})


@dataclass(frozen=True)
class Request:
    name: int
    group: int | None = None


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5))
def test_gather_undoes_partition_for_batches(lengths: list[int], ranks: int) -> None:
    batch = batch_of(lengths)
    parts = partition(batch, ranks)
    results = [take(batch, part) for part in parts]
    assert gather(results, parts).equals(batch)


@given(st.lists(st.none() | st.integers(0, 3), max_size=12), st.integers(1, 5))
def test_gather_undoes_partition_for_requests_and_groups_stay_together(groups: list[int | None], ranks: int) -> None:
    requests = [Request(i, group) for i, group in enumerate(groups)]
    parts = partition(requests, ranks)
    assert len(parts) == ranks
    assert gather([take(requests, part) for part in parts], parts) == requests
    for group in set(groups) - {None}:
        assert sum(any(requests[i].group == group for i in part) for part in parts) == 1


def test_requests_are_spread_by_number() -> None:
    requests = [Request(i, i // 4) for i in range(16)]
    assert sorted(map(len, partition(requests, 2))) == [8, 8]
    assert sorted(map(len, partition(requests, 3))) == [4, 4, 8]


def test_plain_objects_need_no_group() -> None:
    assert sorted(map(len, partition(["a", "b", "c", "d"], 2))) == [2, 2]


def test_fewer_samples_than_ranks() -> None:
    batch = batch_of([3])
    parts = partition(batch, 3)
    assert sorted(map(len, parts)) == [0, 0, 1]
    empty = take(batch, [])
    assert (len(empty), empty.total_tokens, empty.names) == (0, 0, batch.names)
    # an engine may return an empty batch without knowing the columns
    answers = [take(batch, part) if part else Batch({}) for part in parts]
    assert gather(answers, parts).equals(batch)
    assert gather([empty, empty, empty], [[], [], []]).equals(empty)


def test_metrics_are_merged() -> None:
    ranks = [Metrics(), Metrics()]
    for rank, metrics in enumerate(ranks):
        metrics.mean("loss", float(rank), weight=rank + 1)
        metrics.sum("tokens", 10.0)
        metrics.max("lr", 0.5)
    assert gather(ranks, [[0], [1]]).to_dict() == {"loss": pytest.approx(2 / 3), "tokens": 20.0, "lr": 0.5}


def test_nothing_is_gathered_to_nothing() -> None:
    assert gather([None, None], [[0], [1]]) is None


@pytest.mark.parametrize(
    ("results", "error", "message"),
    [
        ([["a"], ["b", "c"]], ValueError, "data-parallel rank 1 returned 2 entries for 1 samples"),
        ([batch_of([1]), batch_of([])], ValueError, "rank 1 returned 0 entries for 1 samples"),
        ([["a"], None], TypeError, "it got list, NoneType"),
        ([{"a": 1}, {"a": 1}], TypeError, "it got dict, dict"),
        ([Metrics(), ["a"]], TypeError, "it got Metrics, list"),
    ],
)
def test_results_that_do_not_fit(results: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gather(results, [[0], [1]])


def test_the_divided_argument_may_be_given_by_name() -> None:
    def train(batch: list[int], objective: str, scale: int = 1) -> tuple[list[int], str, int]:
        return batch, objective, scale

    for args, kwargs in (
        (([1, 2], "o"), {"scale": 3}),
        (([1, 2],), {"objective": "o", "scale": 3}),
        ((), {"objective": "o", "batch": [1, 2], "scale": 3}),
    ):
        argument, call = first_argument(train, args, kwargs)
        assert argument == [1, 2]
        assert call([1]) == ([1], "o", 3)
    with pytest.raises(TypeError, match=r"train\(\) needs the argument 'batch', which is divided"):
        first_argument(train, (), {"objective": "o"})


def test_declarations_are_found_on_the_interface() -> None:
    class Interface:
        @dispatch(Dispatch.SHARD)
        def forward(self) -> None: ...

        @dispatch(Dispatch.BROADCAST)
        def save(self) -> None: ...

        def plain(self) -> None: ...

    class Narrower(Interface):
        def forward(self) -> None: ...

        @dispatch(Dispatch.STREAM)
        def save(self) -> None: ...

    assert dispatch_of(Narrower, "forward") is Dispatch.SHARD
    assert dispatch_of(Narrower, "save") is Dispatch.STREAM
    assert dispatch_of(Interface, "save") is Dispatch.BROADCAST
    assert dispatch_of(Narrower, "plain") is None
    assert dispatch_of(Narrower, "missing") is None


def public_methods(interface: type) -> Iterator[str]:
    for name, member in vars(interface).items():
        if not name.startswith("_") and callable(member):
            yield name


@pytest.mark.parametrize("interface", [TrainEngine, RolloutEngine])
def test_every_method_of_an_engine_says_how_it_is_spread(interface: type) -> None:
    undeclared = {name for name in public_methods(interface) if dispatch_of(interface, name) is None}
    assert undeclared <= {"generate"}  # one request: the caller chooses the worker


def test_units_that_a_call_names_stay_on_one_rank() -> None:
    batch = make_pairs()
    whole = [{0, 5}, {1, 6}, {2, 7}, {3, 4}]
    for args, kwargs in (((batch, PairMargin()), {}), ((), {"objective": PairMargin(), "batch": batch})):
        parts = partition_of_call(TrainEngine, "train", args, kwargs, batch, 3)
        assert sorted(index for part in parts for index in part) == list(range(8))
        assert all(any(unit <= set(part) for part in parts) for unit in whole)
    apart = partition_of_call(TrainEngine, "train", (batch, WeightedLogprobs()), {}, batch, 8)
    assert all(len(part) == 1 for part in apart)
