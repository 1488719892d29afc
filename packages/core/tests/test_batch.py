"""`Batch` against a model of plain Python lists: a batch is a list of rows, and every operation is what it is there."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlcore import Batch, Jagged
from rlcore.errors import BatchError

Rows = list[dict[str, Any]]

row = st.fixed_dictionaries(
    {
        "tokens": st.lists(st.integers(0, 999), max_size=5),
        "score": st.floats(width=32),
        "pair": st.tuples(st.integers(-9, 9), st.integers(-9, 9)).map(list),
        "text": st.text(max_size=4),
    }
)
rows = st.lists(row, max_size=7)


def build(rows: Rows) -> Batch:
    return Batch(
        {
            "tokens": Jagged.from_list([row["tokens"] for row in rows], dtype=torch.int64),
            "squares": Jagged.from_list([[[t * t, t] for t in row["tokens"]] for row in rows], dtype=torch.float64)
            if any(row["tokens"] for row in rows)
            else Jagged(torch.zeros(0, 2, dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64)),
            "score": torch.tensor([row["score"] for row in rows], dtype=torch.float32),
            "pair": torch.tensor([row["pair"] for row in rows], dtype=torch.int64).reshape(-1, 2),
            "text": [row["text"] for row in rows],
        }
    )


def read(batch: Batch) -> Rows:
    """The rows of a batch, checked to be consistent in themselves."""
    assert len(batch) == len(batch.lengths)
    result = []
    for found in batch.rows():
        assert found["squares"].tolist() == [[t * t, t] for t in found["tokens"].tolist()]
        result.append({name: getattr(found[name], "tolist", lambda v=found[name]: v)() for name in ROW})
    return result


ROW = ("tokens", "score", "pair", "text")


def same(left: Rows, right: Rows) -> bool:
    """NaN equals NaN."""
    return repr([sorted(row.items()) for row in left]) == repr([sorted(row.items()) for row in right])


def pick(data: st.DataObject, rows: Rows) -> list[int]:
    return data.draw(st.lists(st.integers(-len(rows), len(rows) - 1), max_size=9) if rows else st.just([]))


@given(rows)
def test_holds_what_it_was_given(rows: Rows) -> None:
    batch = build(rows)
    assert same(read(batch), rows)
    assert batch.total_tokens == sum(len(row["tokens"]) for row in rows)
    assert batch.lengths.tolist() == [len(row["tokens"]) for row in rows]


@given(rows, st.data())
def test_take(rows: Rows, data: st.DataObject) -> None:
    indices = pick(data, rows)
    expected = [rows[i] for i in indices]
    assert same(read(build(rows).take(indices)), expected)
    assert same(read(build(rows).take(torch.tensor(indices, dtype=torch.int32))), expected)


@given(rows, st.data())
def test_filter(rows: Rows, data: st.DataObject) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    assert same(read(build(rows).filter(mask)), [row for row, keep in zip(rows, mask) if keep])


@given(rows, st.integers(-9, 9), st.integers(-9, 9))
def test_slice_is_a_view(rows: Rows, start: int, stop: int) -> None:
    batch = build(rows)
    part = batch.slice(start, stop)
    assert same(read(part), rows[start:stop])
    for name in ("tokens", "squares", "score", "pair"):
        whole, piece = (b[name].values if isinstance(b[name], Jagged) else b[name] for b in (batch, part))
        if piece.numel():
            assert piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@given(rows, st.integers(1, 8))
def test_split_then_concat_is_the_identity(rows: Rows, size: int) -> None:
    batch = build(rows)
    parts = batch.split(size)
    assert [len(part) for part in parts] == [len(rows[i : i + size]) for i in range(0, len(rows), size)]
    assert all(same(read(part), rows[i * size : (i + 1) * size]) for i, part in enumerate(parts))
    assert Batch.concat([*parts, batch.slice(0, 0)]).equals(batch)


@given(rows, rows, st.data())
def test_concat_then_take(left: Rows, right: Rows, data: st.DataObject) -> None:
    indices = pick(data, left + right)
    joined = Batch.concat([build(left), Batch({}), build(right)])
    assert same(read(joined.take(indices)), [(left + right)[i] for i in indices])


@given(rows, st.integers(0, 3))
def test_repeat(rows: Rows, n: int) -> None:
    assert same(read(build(rows).repeat(n)), [row for row in rows for _ in range(n)])


@given(rows, st.integers(1, 4))
def test_partition_covers_every_sample_once(rows: Rows, parts: int) -> None:
    found = build(rows).partition(parts)
    assert len(found) == parts
    assert sorted(i for part in found for i in part) == list(range(len(rows)))


@given(rows, st.integers(1, 4), st.integers(0, 99))
def test_iterate_shuffles_reproducibly(rows: Rows, size: int, seed: int) -> None:
    batch = build(rows).with_columns(index=torch.arange(len(rows)))
    assert Batch.concat(list(batch.iterate(size))).equals(batch if rows else Batch({}))
    first, second = (list(batch.iterate(size, torch.Generator().manual_seed(seed))) for _ in range(2))
    assert all(a.equals(b) for a, b in zip(first, second, strict=True))
    order = [i for part in first for i in part["index"].tolist()]
    assert sorted(order) == list(range(len(rows)))
    assert same([row for part in first for row in read(part)], [rows[i] for i in order])


@given(rows)
def test_union_and_select_and_drop_are_inverse(rows: Rows) -> None:
    batch = build(rows)
    left, right = batch.select("tokens", "text"), batch.drop("tokens", "text")
    assert left.union(right).equals(batch)
    assert left.union(right).names == ("tokens", "text", "squares", "score", "pair")


@given(rows)
def test_rename_swaps(rows: Rows) -> None:
    batch = build(rows)
    swapped = batch.rename(score="pair", pair="score")
    assert swapped.names == ("tokens", "squares", "pair", "score", "text")
    assert torch.equal(swapped["score"], batch["pair"])


@given(rows)
def test_map(rows: Rows) -> None:
    def longer(row: dict[str, Any]) -> dict[str, Any]:
        tokens = torch.cat([row["tokens"], row["tokens"][:1]])
        return {"tokens": tokens, "mask": torch.ones(len(tokens)), "size": len(tokens), "text": row["text"] + "!"}

    mapped = build(rows).map(longer, jagged=["mask"])
    if rows:
        expected = [row["tokens"] + row["tokens"][:1] for row in rows]
        assert [tokens.tolist() for tokens in mapped["tokens"].to_list()] == expected
        assert mapped["size"].tolist() == list(map(len, expected))
        assert mapped["text"] == [row["text"] + "!" for row in rows]
        assert mapped.flat("mask").shape == mapped.flat("tokens").shape


@given(rows)
def test_padded_round_trip(rows: Rows) -> None:
    batch = build(rows).select("tokens", "squares")
    padded = batch.to_padded(tokens=-1)
    width = max((len(row["tokens"]) for row in rows), default=0)
    assert padded["tokens"].tolist() == [row["tokens"] + [-1] * (width - len(row["tokens"])) for row in rows]
    assert Batch.from_padded(padded, padded["tokens"] != -1).equals(batch)
    assert Batch({"tokens": Jagged.from_padded(padded["tokens"], batch.lengths)}).equals(batch.select("tokens"))
    left = batch["tokens"].to_padded(-1, left=True)
    assert left.tolist() == [[-1] * (width - len(row["tokens"])) + row["tokens"] for row in rows]
    assert Batch({"tokens": Jagged.from_mask(left, left != -1)}).equals(batch.select("tokens"))


@given(rows)
def test_pickle_round_trip(rows: Rows) -> None:
    batch = build(rows)
    buffers: list[pickle.PickleBuffer] = []
    assert pickle.loads(pickle.dumps(batch)).equals(batch)
    outside = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    assert pickle.loads(outside, buffers=buffers).equals(batch)


@given(rows)
def test_operations_leave_their_batch_alone(rows: Rows) -> None:
    batch = build(rows)
    before = pickle.dumps(batch)
    batch.select("score"), batch.drop("score"), batch.rename(score="s"), batch.with_columns(score=list(rows))
    batch.take([]), batch.slice(1, 3), batch.split(2), batch.repeat(2), batch.to("cpu"), batch.to_padded(tokens=7)
    batch.with_columns(extra=batch["text"])["extra"].append("x")
    assert pickle.dumps(batch) == before


# --- what the model does not say -----------------------------------------------------------------------------------


def example() -> Batch:
    return build(
        [
            {"tokens": [1, 2, 3], "score": 0.5, "pair": [1, 2], "text": "a"},
            {"tokens": [], "score": 1.5, "pair": [3, 4], "text": "b"},
        ]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_pickles_keep_dtypes(dtype: torch.dtype) -> None:
    batch = Batch({"x": torch.tensor([[0.0, 1.0], [2.0, 0.5]]).to(dtype)})
    assert pickle.loads(pickle.dumps(batch))["x"].dtype == dtype
    assert pickle.loads(pickle.dumps(batch)).equals(batch)


def test_the_pickle_of_a_slice_holds_only_the_slice() -> None:
    tokens = Jagged(torch.zeros(1_000_000), torch.full((1000,), 1000))
    whole = Batch({"tokens": tokens, "dense": torch.zeros(1000, 50), "text": ["x"] * 1000})
    part = whole.slice(10, 12)
    payload = 2 * 1000 * 4 + 2 * 50 * 4 + 2 * 8
    assert payload < len(pickle.dumps(part)) < payload + 1000
    assert payload < len(pickle.dumps(part["tokens"])) + len(pickle.dumps(part.select("dense"))) < payload + 1000


def test_a_pickle_without_copies_is_zero_copy() -> None:
    batch = Batch({"tokens": Jagged(torch.arange(10.0), torch.tensor([4, 6]))})
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    read_only = [bytes(buffer) for buffer in buffers]  # as an object store hands them out
    loaded = pickle.loads(data, buffers=read_only)
    assert loaded.equals(batch)
    assert loaded.flat("tokens").data_ptr() in [np.frombuffer(b, np.uint8).ctypes.data for b in read_only]


def test_a_pickle_drops_the_graph() -> None:
    weights = torch.ones(2, requires_grad=True)
    assert not pickle.loads(pickle.dumps(Batch({"x": weights * 2})))["x"].requires_grad


def test_slicing_does_not_read_the_tokens() -> None:
    """A slice of a batch on the meta device, which holds no values at all."""
    batch = Batch({"tokens": Jagged(torch.empty(10**12, device="meta"), torch.full((10**6,), 10**6))})
    assert batch.slice(10, 12).flat("tokens").shape == (2 * 10**6,)
    assert batch.slice(10, 12).flat("tokens").storage_offset() == 10 * 10**6


def test_equal_lengths_are_shared() -> None:
    batch = Batch({"a": Jagged.from_list([[1], [2, 3]]), "b": Jagged.from_list([[1], [2, 3]])})
    assert batch["a"].lengths is batch["b"].lengths


def test_column_kinds() -> None:
    batch = Batch({"a": np.array([1.5, 2.5]), "b": np.array(["x", "y"]), "c": (1, None), "d": range(2)})
    assert torch.equal(batch["a"], torch.tensor([1.5, 2.5], dtype=torch.float64))
    assert [batch[name] for name in "bcd"] == [["x", "y"], [1, None], [0, 1]]


def test_from_list_keeps_integers_next_to_empty_rows() -> None:
    assert Jagged.from_list([[], [1, 2]]).values.dtype == torch.int64
    assert Jagged.from_list([torch.tensor([1]), torch.tensor([2, 3])]).lengths.tolist() == [1, 2]
    assert Jagged.from_list([]).lengths.tolist() == []


def test_from_rows_chooses_kinds() -> None:
    batch = Batch.from_rows(
        [
            {"tokens": [1, 2], "score": 1, "ok": True, "vector": torch.ones(2), "note": None},
            {"tokens": [], "score": 0.5, "ok": False, "vector": torch.zeros(2), "note": "x"},
        ],
        jagged=["tokens"],
    )
    assert batch["score"].tolist() == [1.0, 0.5]
    assert batch["ok"].dtype == torch.bool
    assert batch["vector"].shape == (2, 2)
    assert batch["note"] == [None, "x"]


def test_equals_sees_every_difference() -> None:
    batch = example()
    assert batch.equals(example())
    others = [
        batch.drop("text"),
        batch.slice(0, 1),
        batch.with_columns(score=batch["score"].double()),
        batch.with_columns(score=batch["score"] + 1),
        batch.with_columns(score=["x", "y"]),
        batch.with_columns(text=["a", "c"]),
        Batch({**{n: batch[n] for n in ("score", "pair", "text")}, "tokens": Jagged.from_list([[1, 2], [3]])}),
    ]
    assert not any(batch.equals(other) or other.equals(batch) for other in others)


def test_repr() -> None:
    assert repr(example()) == "\n".join(
        [
            "Batch: 2 samples, 3 tokens (0 to 3 each)",
            "  tokens   jagged int64 [3] on cpu",
            "  squares  jagged float64 [3, 2] on cpu",
            "  score    dense float32 [2] on cpu",
            "  pair     dense int64 [2, 2] on cpu",
            "  text     objects [2]",
        ]
    )
    assert repr(Batch({})) == "Batch(no columns)"
    assert repr(example()["tokens"]) == "Jagged(int64 [3] over 2 sequences)"


tokens = Jagged.from_list([[1, 2], [3]])

ERRORS = {
    "size": (
        lambda: Batch({"tokens": tokens, "score": torch.zeros(3)}),
        r"column 'score' has 3 samples \(dense float32 \[3\] on cpu\) but column 'tokens' has 2 \(jagged int64",
    ),
    "lengths": (
        lambda: Batch({"tokens": tokens, "mask": Jagged.from_list([[1], [1, 1]])}),
        r"column 'mask' .* and column 'tokens' .* have different lengths, first at sample 0: 1 and 2",
    ),
    "device": (
        lambda: Batch({"tokens": tokens, "score": torch.zeros(2, device="meta")}),
        r"column 'score' is on meta but column 'tokens' is on cpu; move the batch with .to\(device\)",
    ),
    "scalar": (lambda: Batch({"x": torch.tensor(1)}), "column 'x' is a scalar"),
    "string": (lambda: Batch({"x": "math"}), "column 'x' is of type str; give a tensor, a Jagged or a list"),
    "mapping": (lambda: Batch({"x": {"a": 1}}), "column 'x' is of type dict"),
    "number": (lambda: Batch({"x": 1}), "column 'x' is of type int"),  # type: ignore[dict-item]
    "missing": (lambda: example()["scores"], "no column 'scores'; the batch has tokens, squares, score, pair, text"),
    "select": (lambda: example().select("scores"), "no column 'scores'"),
    "drop": (lambda: example().drop("scores"), "no column 'scores'"),
    "rename missing": (lambda: example().rename(scores="x"), "no column 'scores'"),
    "rename clash": (lambda: example().rename(score="text"), "column 'text' cannot be called 'text'"),
    "union": (lambda: example().union(example()), r"both batches have column 'tokens' \(jagged int64 \[3\] on cpu and"),
    "flat": (lambda: example().flat("score"), r"column 'score' \(dense float32 \[2\] on cpu\) is not per token"),
    "no lengths": (lambda: example().select("score").lengths, "no per-token column: it has score"),
    "jagged": (lambda: example().jagged(torch.zeros(4)), r"lengths sum to 3 but values has shape \[4\]"),
    "index above": (lambda: example().take([0, 2]), "index 2 is outside a batch of 2 samples"),
    "index below": (lambda: example().take([-3]), "index -3 is outside a batch of 2 samples"),
    "index of empty": (lambda: Batch({}).take([0]), "index 0 is outside a batch of 0 samples"),
    "mask as index": (lambda: example().take([True, False]), "not bool of shape .*use filter for a mask"),
    "float index": (lambda: example().take(torch.tensor([0.5])), "one row of integers, not float32"),
    "square index": (lambda: example().take(torch.tensor([[0]])), r"of shape \[1, 1\]"),
    "short mask": (lambda: example().filter([True]), r"bool of shape \[1\]; one bool for each of the 2 samples"),
    "number mask": (lambda: example().filter([1, 0]), "the mask is int64"),
    "split": (lambda: example().split(0), "batches of 0 samples"),
    "split unit": (
        lambda: example().with_columns(unit=torch.tensor([7, 7])).split(1, together="unit"),
        "batches of 1 samples would divide unit 7 of column 'unit'",
    ),
    "unit of floats": (
        lambda: example().partition(2, together="score"),
        r"'score' cannot say which samples belong together: .* not float32 of shape \[2\]",
    ),
    "unit per token": (lambda: example().micro_batches(9, together="tokens"), "'tokens' .* not a Jagged"),
    "unit missing": (lambda: example().partition(2, together="unit"), "no column 'unit'"),
    "repeat": (lambda: example().repeat(-1), "-1 times"),
    "partition": (lambda: example().partition(0), "0 parts"),
    "concat names": (lambda: Batch.concat([example(), example().drop("text")]), "batch 1 differs .* columns text"),
    "concat dtype": (
        lambda: Batch.concat([example(), example().with_columns(score=torch.zeros(2, dtype=torch.int64))]),
        r"column 'score' is dense int64 \[2\] on cpu in batch 1 but dense float32 \[2\] on cpu in batch 0",
    ),
    "concat kind": (
        lambda: Batch.concat([example(), example().with_columns(score=["x", "y"])]),
        "column 'score' is objects .* in batch 1 but dense",
    ),
    "concat width": (
        lambda: Batch.concat([example(), example().with_columns(pair=torch.zeros(2, 3, dtype=torch.int64))]),
        r"column 'pair' is dense int64 \[2, 3\]",
    ),
    "rows": (lambda: Batch.from_rows([{"a": 1}, {"b": 1}]), "row 1 differs from row 0 in 'a', 'b'"),
    "uneven tensors": (
        lambda: Batch.from_rows([{"a": torch.zeros(1)}, {"a": torch.zeros(2)}]),
        "the rows' 'a' do not make a column",
    ),
    "row of mixed dtypes": (
        lambda: Jagged.from_list([torch.zeros(1), torch.ones(1, dtype=torch.int64)]),
        "rows are float32 and int64; pass dtype=",
    ),
    "negative length": (lambda: Jagged(torch.zeros(1), torch.tensor([2, -1])), "non-negative .* with -1"),
    "fractional length": (lambda: Jagged(torch.zeros(1), torch.tensor([1.0])), "not float32"),
    "lengths in rows": (lambda: Jagged(torch.zeros(1), torch.tensor([[1]])), r"of shape \[1, 1\]"),
    "wrong sum": (lambda: Jagged(torch.zeros(3), torch.tensor([1, 1])), r"sum to 2 but values has shape \[3\]"),
    "scalar values": (lambda: Jagged(torch.tensor(1.0), torch.tensor([1])), r"values has shape \[\]"),
    "too long": (
        lambda: Jagged.from_padded(torch.zeros(2, 3), [1, 4]),
        r"shape \[2\], longest 4, do not fit padded rows of shape \[2, 3\]",
    ),
    "mask shape": (
        lambda: Batch.from_padded({"t": torch.zeros(2, 3)}, torch.ones(2, 4)),
        r"column 't': a mask of shape \[2, 4\] does not fit rows of shape \[2, 3\]",
    ),
    "fill": (lambda: example().to_padded(score=1), "column 'score' .* is not per token"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_column_and_the_shapes(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(BatchError, match=message):
        call()


def test_the_same_tokens_are_divided_into_other_sequences() -> None:
    lengths = torch.tensor([2, 1, 3])
    batch = Batch(
        {"tokens": Jagged(torch.arange(6), lengths), "group": torch.tensor([7, 8, 9]), "name": ["a", "b", "c"]}
    )
    found = batch.resequenced(torch.tensor([3, 3]), [0, 2])
    assert [row.tolist() for row in found["tokens"].to_list()] == [[0, 1, 2], [3, 4, 5]]
    assert (found["group"].tolist(), found["name"]) == ([7, 9], ["a", "c"])
