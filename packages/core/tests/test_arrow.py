"""Arrow and Parquet forms of `Batch`: exact, zero-copy where promised, safe against crashes and foreign files."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlcore import Batch, Jagged
from rlcore.errors import BatchError, DataError

SUFFIXES = (".arrow", ".parquet")
DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern of ``dtype``: NaNs with payloads, infinities and negative zeros included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = draw(st.lists(st.integers(0, 4), max_size=5))
    size, total = len(lengths), sum(lengths)
    columns: dict[str, Any] = {}
    for index in range(draw(st.integers(0, 3))):
        trailing = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
        dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 999))
        if draw(st.booleans()):
            values = random_bits((total, *trailing), dtype, seed)
            columns[f"jagged {index}"] = Jagged(values, torch.tensor(lengths, dtype=torch.int64))
        else:
            columns[f"dense {index}"] = random_bits((size, *trailing), dtype, seed)
    for name, values in (("text", st.text()), ("any text", st.text(st.characters())), ("json", json_values)):
        if draw(st.booleans()):
            columns[name] = draw(st.lists(values, min_size=size, max_size=size))
    return Batch(columns)


@given(batches(), st.integers(0, 5), st.integers(0, 5))
def test_table_round_trip(batch: Batch, start: int, stop: int) -> None:
    assert Batch.from_arrow(batch.to_arrow()).equals(batch)
    part = batch.slice(start, stop)
    assert Batch.from_arrow(part.to_arrow()).equals(part)
    if batch.names:
        sliced = batch.to_arrow().slice(min(start, len(batch)), max(0, stop - start))
        assert Batch.from_arrow(sliced).equals(part)
        assert Batch.from_arrow(pa.concat_tables([batch.to_arrow(), part.to_arrow()])).equals(
            Batch.concat([batch, part])
        )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_round_trip(suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("files") / f"batch{suffix}"

    @given(batches())
    def check(batch: Batch) -> None:
        batch.save(path)
        assert Batch.load(path).equals(batch)

    check()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_by_bit(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    batch = Batch(
        {
            "tokens": Jagged(random_bits((3000, 2), dtype, 0), torch.tensor([0, 1000, 0, 0, 1999, 1, 0])),
            "dense": random_bits((7, 3, 2), dtype, 1),
        }
    )
    batch.save(tmp_path / f"batch{suffix}")
    loaded = Batch.load(tmp_path / f"batch{suffix}")
    assert loaded.equals(batch)
    assert loaded.flat("tokens").dtype == dtype


def example() -> Batch:
    return Batch(
        {
            "tokens": Jagged.from_list([[1, 2, 3], [], [4]]),
            "logprobs": Jagged.from_list([[-0.5, -1.0, -2.0], [], [-0.25]]).with_values(
                torch.tensor([-0.5, -1.0, -2.0, -0.25], dtype=torch.bfloat16)
            ),
            "score": torch.tensor([1.0, 0.5, 0.0]),
            "mask": torch.tensor([True, False, True]),
            "text": ["a", "b", "c"],
            "truth": [1, "x", {"y": None}],
        }
    )


def test_other_tools_can_read_the_table() -> None:
    table = example().to_arrow()
    assert table["tokens"].to_pylist() == [[1, 2, 3], [], [4]]
    assert table["score"].to_pylist() == [1.0, 0.5, 0.0]
    assert table["mask"].to_pylist() == [True, False, True]
    assert table["text"].to_pylist() == ["a", "b", "c"]
    assert [json.loads(text) for text in table["truth"].to_pylist()] == [1, "x", {"y": None}]
    assert table.schema.field("tokens").type == pa.large_list(pa.int64())


def test_text_that_utf8_lacks_survives() -> None:
    batch = Batch({"x": ["fine", "lone \ud800 surrogate"]})
    assert Batch.from_arrow(batch.to_arrow()).equals(batch)


@pytest.mark.parametrize("first", [["0", None], ["0", "1"], ["\r0", "\r"]], ids=["json", "text", "marked"])
def test_tables_put_together_keep_their_objects(first: list[str | None]) -> None:
    batches = [Batch({"x": first}), Batch({"x": ["0", "x"]}), Batch({"x": [0, {"y": "z"}]})]
    table = pa.concat_tables([batch.to_arrow() for batch in batches])
    assert Batch.from_arrow(table)["x"] == [*first, "0", "x", 0, {"y": "z"}]


def test_json_brings_tuples_back_as_lists() -> None:
    assert Batch.from_arrow(Batch({"x": [(1, 2)]}).to_arrow())["x"] == [[1, 2]]


def test_a_table_shares_the_memory_of_its_batch() -> None:
    batch = example()
    table = batch.to_arrow()
    for name in ("tokens", "logprobs"):
        chunk = table[name].chunk(0)
        assert chunk.values.buffers()[1].address == batch.flat(name).data_ptr()
        assert chunk.buffers()[1].address == batch[name].offsets.data_ptr()
        assert Batch.from_arrow(table).flat(name).data_ptr() == batch.flat(name).data_ptr()
    assert table["score"].chunk(0).buffers()[1].address == batch["score"].data_ptr()
    assert Batch.from_arrow(table)["score"].data_ptr() == batch["score"].data_ptr()


def test_arrow_files_are_mapped_not_read(tmp_path: Path) -> None:
    size = 64_000_000
    path = tmp_path / "big.arrow"
    Batch({"tokens": Jagged(torch.zeros(size, dtype=torch.uint8), torch.tensor([size]))}).save(path)
    resident = resident_bytes()
    batch = Batch.load(path)
    assert resident_bytes() - resident < size // 10
    assert batch.flat("tokens").shape == (size,)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writing_into_a_loaded_tensor_does_not_change_the_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"batch{suffix}"
    example().save(path)
    Batch.load(path).flat("tokens").fill_(9)
    assert Batch.load(path).equals(example())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_mapped_batch_outlives_its_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"batch{suffix}"
    example().save(path)
    loaded = Batch.load(path)
    example().slice(0, 1).save(path)
    path.unlink()
    assert loaded.equals(example())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "er" / f"batch{suffix}"
    example().save(path)

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        example().slice(0, 1).save(path)
    assert list(path.parent.iterdir()) == [path]
    assert Batch.load(path).equals(example())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(b"not a batch at all " * 100)


def write_foreign(path: Path) -> None:
    table = pa.table({"tokens": [[1, 2], [3]]})
    if path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "no such file"),
        (truncate, "is damaged, or not a"),
        (halve, "is damaged, or not a"),
        (empty, "is damaged, or not a"),
        (scramble, "is damaged, or not a"),
        (write_foreign, "the table was not written by Batch"),
    ],
)
def test_bad_files_are_named(damage: Callable[[Path], None], message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"batch{suffix}"
    example().save(path)
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        Batch.load(path)
    assert str(path) in str(caught.value)


def test_flipped_bits_in_parquet_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "batch.parquet"
    Batch({"x": torch.randn(1000)}).save(path)
    data = bytearray(path.read_bytes())
    data[2000] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        Batch.load(path)


def test_other_endings_and_versions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"saved as .arrow or .parquet, not .csv"):
        example().save(tmp_path / "batch.csv")
    with pytest.raises(DataError, match="without an ending"):
        Batch.load(tmp_path / "batch")
    newer = example().to_arrow().replace_schema_metadata({"rlcore.batch": "2"})
    with pytest.raises(DataError, match=r"in format 2 of rlcore.batch; this version reads 1"):
        Batch.from_arrow(newer)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([object()], "'x' holds objects that JSON cannot express"),
        (torch.zeros(1, dtype=torch.complex64), r"'x' \(torch.complex64 \[1\]\) cannot be stored"),
        (torch.zeros(1, 0), r"'x' \(torch.float32 \[1, 0\]\) cannot be stored"),
    ],
)
def test_what_cannot_be_stored_is_named(column: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        Batch({"x": column}).to_arrow()
