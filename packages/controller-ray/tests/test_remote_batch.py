"""`RemoteBatch` against `Batch`: the same operations on the same samples give the same batch, or the same error."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcore import Batch, Jagged
from rlcore.errors import BatchError
from rlcore_ray import RemoteBatch, cluster
from rlcore_ray.calls import packed, unpacked
from rlcore_ray.remote_batch import materialize

examples = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def _cluster(forked_workers: None) -> Iterator[None]:
    own = cluster.connect(None, {})
    yield
    if own:
        cluster.disconnect()


def batch_of(lengths: list[int], first: int = 0) -> Batch:
    """Every value tells which sample and token it belongs to."""
    rows = range(first, first + len(lengths))
    tokens = Jagged(
        torch.tensor([100 * row + t for row, n in zip(rows, lengths) for t in range(n)], dtype=torch.int64),
        torch.tensor(lengths, dtype=torch.int64),
    )
    return Batch(
        {
            "group": torch.tensor([row // 2 for row in rows], dtype=torch.int64),
            "tokens": tokens,
            "text": [f"sample {row}" for row in rows],
            "mask": tokens.with_values(torch.stack([tokens.values % 2, tokens.values % 3], -1).float()),
            "score": torch.arange(len(rows), dtype=torch.float32)[:, None] + torch.tensor([0.0, 0.5]),
        }
    )


def stored(value: Any) -> Any:
    """A worker's answer ``value`` as the controller gets it."""
    head, body = packed(value)
    return unpacked(head, ray.put(body))


def made(batch: Batch, parts: list[list[int]], values: Callable[[torch.Tensor], torch.Tensor]) -> Batch | RemoteBatch:
    """What ranks make of their parts of ``batch``, under the name "out"."""
    refs = []
    for part in parts:
        own = batch.take(part)
        refs.append(ray.put((Batch({"out": own.jagged(values(own.flat("tokens")))}),)))
    return RemoteBatch.pending(refs, parts, batch.lengths)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Batch, RemoteBatch]:
    """A batch, and the same in chunks: rollouts in several answers, then columns from ranks in another order."""
    sizes = draw(st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=4))
    starts = [sum(map(len, sizes[:number])) for number in range(len(sizes))]
    answers = [batch_of(lengths, start) for lengths, start in zip(sizes, starts)]
    order = draw(st.permutations(range(sum(map(len, sizes)))))
    local = Batch.concat(answers).take(order)
    together = draw(st.booleans())  # one answer with several batches, or several answers
    chunks = stored(answers) if together else [stored(answer) for answer in answers]
    remote = RemoteBatch.concat(chunks).take(order)
    if draw(st.booleans()):
        parts = local.partition(draw(st.integers(1, 4)))
        columns = made(local, parts, lambda tokens: tokens * 0.25)
        local = local.with_columns(logprobs=local.jagged(local.flat("tokens") * 0.25))
        remote = remote.with_columns(logprobs=columns["out"])
    return local, remote


def same(local: Batch, remote: RemoteBatch) -> None:
    assert isinstance(remote, RemoteBatch)
    assert remote.names == local.names
    assert remote.jagged_names == local.jagged_names
    assert remote.object_names == local.object_names
    assert len(remote) == len(local)
    assert "tokens" in remote or "tokens" not in local
    if local.jagged_names:
        assert remote.lengths.dtype == torch.int64
        assert remote.lengths.tolist() == local.lengths.tolist()
        assert remote.total_tokens == local.total_tokens
    else:
        with pytest.raises(BatchError, match="no per-token column"):
            remote.lengths  # noqa: B018
    for name in local.names:
        if isinstance(local[name], torch.Tensor):
            assert torch.equal(remote[name], local[name])
    read = materialize(remote)
    assert read.names == local.names
    assert read.equals(local)


Pair = tuple[Any, Any]
OPERATIONS = ("take", "filter", "slice", "split", "concat", "select", "drop", "dense", "copy", "partition")


def both(pair: Pair, work: Callable[[Any], Any]) -> Pair | None:
    """``work`` on both; None where both refuse."""
    results = []
    for batch in pair:
        try:
            results.append(work(batch))
        except BatchError:
            results.append(BatchError)
    assert (results[0] is BatchError) == (results[1] is BatchError), results
    return None if results[0] is BatchError else (results[0], results[1])


def step(pair: Pair, operation: str, data: st.DataObject) -> Pair | None:
    """One operation on both, drawn so that it sometimes cannot be done."""
    size, names = len(pair[0]), [*pair[0].names, "nonsense"]
    some = st.lists(st.sampled_from(names[:-1] or names), unique=True) | st.lists(st.sampled_from(names), unique=True)
    if operation == "take":
        within = st.lists(st.integers(-size, size - 1), max_size=8) if size else st.just([])
        indices = data.draw(within | st.lists(st.integers(-9, 9), max_size=2))
        return both(pair, lambda batch: batch.take(indices))
    if operation == "filter":
        length = data.draw(st.sampled_from([size, size, size, size + 1]))
        mask = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
        return both(pair, lambda batch: batch.filter(torch.tensor(mask, dtype=torch.bool)))
    if operation == "slice":
        start, stop = data.draw(st.integers(-9, 9)), data.draw(st.integers(-9, 9))
        return both(pair, lambda batch: batch.slice(start, stop))
    if operation == "split":
        width = data.draw(st.integers(0, 4))
        parts = both(pair, lambda batch: batch.split(width))
        if parts is None:
            return None
        assert list(map(len, parts[0])) == list(map(len, parts[1]))
        keep = data.draw(st.lists(st.booleans(), min_size=len(parts[0]), max_size=len(parts[0])))
        kept = [[part for part, keeps in zip(side, keep) if keeps] for side in parts]
        return type(pair[0]).concat(kept[0]), type(pair[1]).concat(kept[1])
    if operation == "concat":
        start = data.draw(st.integers(0, 5))
        without = data.draw(some)
        return both(pair, lambda batch: batch.concat([batch, batch.slice(start, start + 2).drop(*without), batch]))
    if operation == "select":
        chosen = data.draw(some)
        return both(pair, lambda batch: batch.select(*chosen))
    if operation == "drop":
        left = data.draw(some)
        return both(pair, lambda batch: batch.drop(*left))
    if operation == "dense":
        extra = torch.arange(data.draw(st.sampled_from([size, size, size + 1])), dtype=torch.float64)
        name = data.draw(st.sampled_from(names))
        return both(pair, lambda batch: batch.with_columns(**{name: extra}))
    if operation == "copy":
        source, name = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
        return both(pair, lambda batch: batch.with_columns(**{name: batch[source]}))
    parts = data.draw(st.integers(1, 5))
    found = both(pair, lambda batch: batch.partition(parts))
    assert found is not None
    assert found[0] == found[1]
    return None


@examples
@given(pairs(), st.lists(st.sampled_from(OPERATIONS), max_size=6), st.data())
def test_sequences_of_operations(pair: Pair, operations: list[str], data: st.DataObject) -> None:
    same(*pair)
    for operation in operations:
        pair = step(pair, operation, data) or pair
        same(*pair)


@examples
@given(st.lists(st.integers(0, 4), max_size=6), st.integers(1, 4), st.data())
def test_a_pending_batch_is_taken_and_joined(lengths: list[int], ranks: int, data: st.DataObject) -> None:
    """Its column names are not known yet; parts without samples make nothing, or columns of no tokens."""
    batch = batch_of(lengths)
    remote = made(batch, batch.partition(ranks), lambda tokens: tokens + 1)
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6)) if lengths else []
    moved = remote.take(indices)
    joined = RemoteBatch.concat([moved, remote.slice(0, 2), remote])
    expected = Batch.concat([batch.take(indices), batch.slice(0, 2), batch])
    assert joined.lengths.tolist() == expected.lengths.tolist()
    assert len(joined) == len(expected)
    want = Batch({"new": expected.jagged(expected.flat("tokens") + 1)})
    assert materialize(RemoteBatch({}).with_columns(new=joined["out"])).equals(want)


def test_an_empty_share_keeps_kinds_and_dtypes() -> None:
    """Ranks without samples take part: their engines want the same columns as the others'."""
    batch = batch_of([2, 3])
    remote = stored(batch)
    for empty in (remote.slice(0, 0), remote.take([]), remote.filter(torch.tensor([False, False])).take([])):
        same(batch.slice(0, 0), empty)
    none = RemoteBatch.concat([remote.slice(0, 0), remote.slice(1, 1)])
    same(batch.slice(0, 0), none)
    same(batch, RemoteBatch.concat([none, remote]))


def test_lengths_come_with_the_first_per_token_column() -> None:
    batch = batch_of([2, 0, 3])
    remote = stored(batch)
    scores = remote.select("score", "group")
    same(batch.select("score", "group"), scores)
    assert scores.partition(2) == batch.select("score", "group").partition(2)
    assert scores.partition(2, together="group") == batch.select("score", "group").partition(2, together="group")
    with pytest.raises(BatchError, match="would divide unit"):
        scores.split(1, together="group")
    joined = RemoteBatch.concat([scores, scores])
    tokens = RemoteBatch.concat([remote, remote])["tokens"]
    same(Batch.concat([batch, batch]).select("score", "group", "tokens"), joined.with_columns(tokens=tokens))


def test_errors_name_the_column() -> None:
    batch = batch_of([2, 3])
    remote, other = stored(batch), stored(batch_of([3, 2]))
    with pytest.raises(BatchError, match="no column 'nonsense'; the batch has group, tokens, text, mask, score"):
        remote["nonsense"]
    with pytest.raises(BatchError, match="column 'mask' has other lengths"):
        remote.with_columns(tokens=remote["tokens"], mask=other["mask"])
    with pytest.raises(BatchError, match="column 'text' has 1 samples, the batch has 2"):
        remote.with_columns(text=remote.slice(0, 1)["text"])
    with pytest.raises(BatchError, match="column 'text' is a list; a batch by reference takes dense columns only"):
        remote.with_columns(text=["a", "b"])
    with pytest.raises(BatchError, match="batch 1 differs from batch 0 in columns text"):
        RemoteBatch.concat([remote, remote.drop("text")])
    with pytest.raises(BatchError, match=r"column 'score' is dense torch.int64 .B. in batch 1 but dense torch.float32"):
        RemoteBatch.concat([remote, remote.with_columns(score=torch.tensor([1, 2]))])
    with pytest.raises(BatchError, match="column 'text' is jagged in batch 1 but objects in batch 0"):
        RemoteBatch.concat([remote, remote.with_columns(text=remote["tokens"])])
    with pytest.raises(BatchError, match="column 'mask' is stored under different names: mask and others"):
        RemoteBatch.concat([remote, remote.with_columns(mask=remote["tokens"])])
    mixed = RemoteBatch.concat([remote, stored(batch.with_columns(tokens=batch.jagged(batch.flat("tokens").double())))])
    with pytest.raises(BatchError, match=r"workers returned column 'tokens' as torch.float64 .. and as torch.int64"):
        mixed.fetch()


def test_who_should_have_made_samples_and_did_not_is_found_out_by_the_reader() -> None:
    lengths = torch.tensor([1, 1])
    nothing = RemoteBatch.pending([ray.put(None)], [[0, 1]], lengths)
    with pytest.raises(BatchError, match="do not exist: the call"):
        RemoteBatch({"x": nothing["x"]}).fetch()
    short = ray.put((Batch({"x": Jagged.from_list([[1]])}),))
    with pytest.raises(BatchError, match="a worker returned 1 entries for 2 samples"):
        RemoteBatch({"x": RemoteBatch.pending([short], [[0, 1]], lengths)["x"]}).fetch()
    with pytest.raises(BatchError, match="no column 'y'"):
        RemoteBatch({"y": RemoteBatch.pending([short], [[0]], lengths[:1])["y"]}).fetch()


def test_what_stands_in_one_stretch_is_not_copied() -> None:
    remote = stored(batch_of([2000, 1000, 3000]))
    whole, part = remote.fetch(), remote.slice(1, 3).fetch()
    begin = whole.flat("tokens").data_ptr()
    assert part.flat("tokens").data_ptr() == begin + 2000 * 8
    assert part.flat("tokens").tolist() == whole.flat("tokens").tolist()[2000:]
    assert remote.take([2, 0]).fetch().flat("tokens").data_ptr() != begin


def test_chunks_that_no_batch_needs_are_released() -> None:
    first, second = stored(batch_of([2, 3])), stored(batch_of([1], first=2))
    both = RemoteBatch.concat([first, second])
    assert both["tokens"].source.chunks == first["tokens"].source.chunks + second["tokens"].source.chunks
    assert both.take([2])["tokens"].source.chunks == second["tokens"].source.chunks
    assert both.take([1, 1])["tokens"].source.chunks == first["tokens"].source.chunks
