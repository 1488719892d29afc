"""Files in many formats, larger than memory, or with images."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlcore.errors import DataError
from rlcore_kit.testing.tiny_model import tiny_tokenizer
from rlcore_recipes.data import parquet, sample_store, text_files
from rlcore_recipes.data.files import Fingerprint, read_rows
from rlcore_recipes.data.loader import PromptLoader
from rlcore_recipes.data.prompts import PromptDataset, load_prompts
from rlcore_recipes.data.settings import DataSettings, SFTDataSettings
from rlcore_recipes.data.sft import load_sft

TOKENIZER = tiny_tokenizer()
ROWS: list[dict[str, Any]] = [
    {"prompt": f"question {n}", "answer": str(n), "level": n, "share": n / 2} for n in range(5)
]
PNG = {"bytes": b"\x89PNG", "path": None}


def prompts(*files: str) -> PromptDataset:
    return load_prompts(DataSettings(train_files=list(files)), files, TOKENIZER)


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_text(separator: str) -> bytes:
    lines = [ROWS[0].keys(), *([f'"{row["prompt"]}"', *map(str, list(row.values())[1:])] for row in ROWS)]
    return "\n".join(separator.join(line) for line in lines).encode()


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(jsonl(ROWS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(ROWS))),
    "a.json.bz2": lambda path: path.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: path.write_bytes(jsonl(ROWS)),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
    "a.arrow": lambda path: pa.ipc.new_stream(path, pa.Table.from_pylist(ROWS).schema).write_table(
        pa.Table.from_pylist(ROWS)
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_all_formats_give_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read_rows(tmp_path / name) == ROWS


def test_cells_become_numbers_only_where_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'prompt,zip,n,x,right,mixed,empty\n"a, b\nc",007,1,0.5,True,7,\nd,1,-2,3,False,1/2,\ne,2,,1e3,True,"",\n'
    )
    first, second, third = read_rows(tmp_path / "a.csv")
    assert first == {
        "prompt": "a, b\nc", "zip": "007", "n": 1, "x": "0.5", "right": True, "mixed": "7", "empty": None
    }  # fmt: skip
    assert (second["n"], second["x"], second["mixed"]) == (-2, "3", "1/2")
    assert (third["n"], third["x"], third["mixed"]) == (None, "1e3", None)
    (tmp_path / "b.tsv").write_bytes(csv_text("\t"))
    assert read_rows(tmp_path / "b.tsv") == [{**row, "answer": int(row["answer"])} for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,answer\nq\n", r"a\.csv, line 2 has 1 cells, and the first line names 2 columns"),
        ("a.csv", b"prompt,prompt\nq,q\n", "more than one column of the same name"),
        ("a.csv", b'prompt,answer\nq,"a\n', r"line 2 cannot be read: Error: unexpected end of data"),
        ("a.csv", b"prompt\n\xff\n", r"a\.csv, line . cannot be read: UnicodeDecodeError"),
        ("a.csv", b"prompt\n", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.json", b"[1]", r"item 0 of the array is a JSON int, not an object"),
        ("a.json", b"[{]", r"a\.json is not JSON in UTF-8"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b'{"train": [\n', r"line 1 is not JSON"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read: BadGzipFile"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:40], r"a\.jsonl\.gz cannot be read: EOFError"),
        ("a.arrow", b"no arrow", r"a\.arrow cannot be read by the library datasets"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prompts(str(tmp_path / name))


def test_folders_of_the_library_datasets(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": data.shuffle(seed=0), "test": data.select([3])})
    splits.save_to_disk(str(tmp_path / "data"))
    assert [sample.ground_truth for sample in prompts(str(tmp_path / "data" / "test"))] == ["3"]
    assert sorted(row["level"] for row in read_rows(tmp_path / "data" / "train")) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"has several splits; name the folder of one of them: .*/train, .*/test"):
        prompts(str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"is a folder that Dataset\.save_to_disk has not written; name the files"):
        prompts(str(tmp_path))


def test_files_of_different_columns_are_read_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"prompt": "q", "ground_truth": 1, "data_source": "x"}]))
    verl = {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "2"}, "data_source": "y"}
    pq.write_table(pa.Table.from_pylist([verl]), tmp_path / "b.parquet")
    WRITERS["a.json"](tmp_path / "c.json")
    data = prompts(*(str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.json")))
    assert [(sample.ground_truth, sample.data_source) for sample in data][:3] == [(1, "x"), ("2", "y"), ("0", "c")]
    assert data.file_sizes == [1, 1, 5]


def test_a_large_data_set_is_read_in_chunks_and_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "q" * (n % 7 + 1), "answer": str(n), "extra_info": {"n": n}} for n in range(50)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=20)
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    in_memory = prompts(*files)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 300)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 300)
    monkeypatch.setattr(sample_store, "MEMORY_BYTES", 1000)
    on_disk = prompts(*files)
    assert list(on_disk) == list(in_memory)
    assert on_disk.fingerprints == in_memory.fingerprints
    whole = Fingerprint("a")
    whole.add(rows)
    assert on_disk.fingerprints[0] == whole.hex()
    batches = [PromptLoader(data, 8, seed=3) for data in (in_memory, on_disk)]
    assert [next(batches[0]) for _ in range(15)] == [next(batches[1]) for _ in range(15)]
    assert on_disk[-1] == in_memory[99]
    with pytest.raises(IndexError):
        on_disk[100]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", ["a.png"]),
        ("images", [PNG]),
        ("picture", PNG),
        ("sound", [{"array": [0.5], "sampling_rate": 16000}]),
        ("videos", ["a.mp4"]),
    ],
)
def test_images_are_refused_and_never_dropped(tmp_path: Path, name: str, value: Any) -> None:
    rows = [{"prompt": "q", "response": "a", name: None}, {"prompt": "q", "response": "a", name: value}]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "b"))
    files = [str(tmp_path / "a.parquet"), str(tmp_path / "b")]
    if b"bytes" not in str(value).encode():
        (tmp_path / "c.jsonl").write_bytes(jsonl(rows))
        files.append(str(tmp_path / "c.jsonl"))
    for file in files:
        with pytest.raises(DataError, match=f"row 1: column '{name}' holds images, audio or video"):
            prompts(file)
        with pytest.raises(DataError, match=f"row 1: column '{name}' holds images, audio or video"):
            load_sft(SFTDataSettings(train_files=[file]), [file], TOKENIZER)


def test_names_of_images_are_text(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "image": "registry/of/a:container", "images": []}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert len(prompts(str(tmp_path / "a.jsonl"), str(tmp_path / "a.parquet"))) == 2
