"""Data that is tokenised before the run: by the user, by `rlcore data tokenize`, or at an earlier start."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from rlcore.batch import Batch
from rlcore.cli.command_tree import cli
from rlcore.engines import ModelSettings
from rlcore.errors import DataError
from rlcore_kit.testing.tiny_model import tiny_model, tiny_tokenizer
from rlcore_recipes.data import sft_sample
from rlcore_recipes.data.loader import BatchLoader
from rlcore_recipes.data.settings import SFTDataSettings
from rlcore_recipes.data.sft import SFTDataset, load_sft
from rlcore_recipes.data.tokenizer import load_tokenizer

TOKENIZER = tiny_tokenizer()
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]


def load(path: Path, tokenizer: Any = TOKENIZER, limit: int | None = None, **settings: Any) -> SFTDataset:
    return load_sft(SFTDataSettings(train_files=[str(path)], **settings), [str(path)], tokenizer, limit)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversations(path: Path, count: int = 20) -> Path:
    chats = [
        [{"role": "user", "content": "x" * (n % 7 + 1)}, {"role": "assistant", "content": str(n)}] for n in range(count)
    ]
    return write(path, [{"messages": chat, "data_source": f"s{n % 3}"} for n, chat in enumerate(chats)])


def columns(data: SFTDataset) -> tuple[list[list[int]], list[list[float]], list[str]]:
    batch = data.take(range(len(data)))
    return *([row.tolist() for row in batch[name].to_list()] for name in ("tokens", "loss_mask")), batch["data_source"]


@pytest.mark.parametrize("name", ["loss_mask", "labels", "completion_mask", "assistant_masks"])
def test_tokens_of_the_user_are_learned_as_the_text_would_be(tmp_path: Path, name: str) -> None:
    raw = load(conversations(tmp_path / "raw.jsonl"))
    tokens, masks, sources = columns(raw)
    marks = [[int(m) for m in mask] for mask in masks]
    if name == "labels":
        marks = [[t if m else -100 for t, m in zip(ids, mask)] for ids, mask in zip(tokens, masks)]
    rows = [{"input_ids": t, name: m, "data_source": s} for t, m, s in zip(tokens, marks, sources)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert columns(load(tmp_path / "a.parquet")) == columns(load(write(tmp_path / "a.jsonl", rows))) == columns(raw)


def test_padding_and_the_label_of_the_first_token_are_left_out(tmp_path: Path) -> None:
    row = {"input_ids": [0, 5, 6, 7, 0], "attention_mask": [0, 1, 1, 1, 0], "labels": [-100, 5, 6, -100, -100]}
    tokens, masks, _ = columns(load(write(tmp_path / "a.jsonl", [row])))
    assert (tokens, masks) == ([[5, 6, 7]], [[0, 1, 0]])


def test_rows_without_learned_tokens_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6], "loss_mask": mask} for mask in ([0, 1], [1, 0], [0, 0])]
    data = load(write(tmp_path / "a.jsonl", rows))
    assert len(data) == 1
    assert data.notes[-2:] == [
        f"2 samples without a learned token are left out (the first: {tmp_path / 'a.jsonl'}, row 1)",
        "50.0% of 2 tokens are learned",
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "has tokens and no column that says which of them are learned"),
        ({"labels": [5, 6], "loss_mask": [1, 1]}, "has loss_mask and labels, which may differ"),
        ({"loss_mask": [1]}, "row 0: column 'loss_mask' has 1 entries for 2 tokens"),
        ({"loss_mask": [1, 2]}, "row 0: column 'loss_mask' must hold 0 and 1 alone"),
        ({"labels": [6, -100]}, "row 0: label 0 is 6, and the token there is 5; .* are not shifted"),
        ({"loss_mask": [0, 1], "attention_mask": [1]}, "row 0: column 'attention_mask' has 1 entries"),
        ({"loss_mask": [0, 1], "position_ids": [0, 0]}, "row 0: .* several packed samples"),
        ({"loss_mask": [0, 1.5]}, "row 0: column 'loss_mask' must hold whole numbers"),
        ({"loss_mask": None}, "row 0: column 'loss_mask' must hold a list of numbers, not None"),
        ({"loss_mask": [0, 1], "messages": TURNS}, "several columns to learn from, 'input_ids' and 'messages'"),
        ({"input_ids": [5, 2**40], "loss_mask": [0, 1]}, "row 0: column 'input_ids' has numbers that are no token ids"),
        ({"input_ids": [5, -1], "loss_mask": [0, 1]}, "row 0: column 'input_ids' has numbers that are no token ids"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        load(write(tmp_path / "a.jsonl", [{"input_ids": [5, 6], **row}]))


def test_the_next_start_reads_what_this_one_tokenised(tmp_path: Path) -> None:
    file, cache = conversations(tmp_path / "raw.jsonl"), tmp_path / "cache"
    plain = load(file)

    def cached(tokenizer: Any = TOKENIZER, **settings: Any) -> tuple[SFTDataset, set[Path]]:
        data = load(file, tokenizer, cache_dir=str(cache), **settings)
        return data, {path.parent for path in cache.glob("*/samples.arrow")}

    first, entries = cached()
    [entry] = entries
    written = (entry / "samples.arrow").stat().st_mtime_ns
    second, entries = cached()
    assert (entries, (entry / "samples.arrow").stat().st_mtime_ns) == ({entry}, written)
    assert columns(first) == columns(second) == columns(plain)
    assert (first.fingerprints, first.ends, first.file_sizes) == (plain.fingerprints, plain.ends, plain.file_sizes)
    assert f"kept in {entry}" in second.notes

    assert len(cached(learn="everything")[1]) == 2
    assert len(cached(train_batch_size=3, shuffle=False)[1]) == 2, "these change no token"
    other = tiny_tokenizer()
    other.chat_template = "{# another #}" + other.chat_template
    assert len(cached(other)[1]) == 3
    conversations(file, 21)
    assert len(cached()[0]) == 21


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_model(tmp_path_factory.mktemp("model")))


def tokenise(model: Path, out: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["data", "tokenize", "--out", str(out), f"model.path={model}", *words])


def test_a_tokenised_folder_is_read_as_the_file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_sample, "BATCH_TOKENS", 30)  # several record batches
    file = conversations(tmp_path / "raw.jsonl")
    result = tokenise(model, tmp_path / "out", f"data.train_files={file}")
    assert (result.exit_code, "20 samples, 1" in result.output) == (0, True), result.output
    folder, tokenizer = tmp_path / "out" / "raw", load_tokenizer(ModelSettings(path=str(model)))
    assert columns(load(folder, tokenizer)) == columns(load(file, tokenizer))
    assert columns(load(folder, tokenizer, limit=7)) == columns(load(file, tokenizer, limit=7))
    assert len(load(folder, tokenizer).samples[3:5]) == 2
    assert load(folder, tokenizer).fingerprints == load(file, tokenizer).fingerprints

    assert "exist already" in str(tokenise(model, tmp_path / "out", f"data.train_files={file}").output)
    assert tokenise(model, tmp_path / "out", "--overwrite", f"data.train_files={file}").exit_code == 0
    (tmp_path / "raw").mkdir()
    result = tokenise(model, tmp_path, "--overwrite", f"data.train_files={file}")
    assert "hold something else" in result.output
    with pytest.raises(DataError, match=r"samples of up to \d+ tokens, more than data.max_length=5"):
        load(folder, tokenizer, max_length=5)
    with pytest.raises(DataError, match="another tokenizer or chat template"):
        load(folder, tiny_tokenizer())
    with pytest.raises(DataError, match=r"token \d+ is beyond the model's vocabulary of 3"):
        load_sft(SFTDataSettings(train_files=[str(folder)]), [str(folder)], tokenizer, None, 3)
    samples = folder / "samples.arrow"
    samples.write_bytes(samples.read_bytes()[:300])
    with pytest.raises(DataError, match="is damaged"):
        load(folder, tokenizer)


def test_every_sample_comes_once_and_a_resumed_loader_goes_on_with_the_same(tmp_path: Path, model: Path) -> None:
    file = conversations(tmp_path / "raw.jsonl", 24)
    assert tokenise(model, tmp_path / "out", f"data.train_files={file}").exit_code == 0
    data = load(tmp_path / "out" / "raw", load_tokenizer(ModelSettings(path=str(model))))

    def loader() -> BatchLoader:
        return BatchLoader(data, data.file_sizes, 4, seed=1, fingerprints=data.fingerprints)

    def rows(batch: Batch) -> list[list[int]]:
        return [row.tolist() for row in batch["tokens"].to_list()]

    whole = loader()
    batches = [rows(next(whole)) for _ in range(12)]
    for epoch in (batches[:6], batches[6:]):
        assert sorted(row for batch in epoch for row in batch) == sorted(columns(data)[0])
    for step in range(12):
        before, resumed = loader(), loader()
        for _ in range(step):
            next(before)
        next(resumed)  # batches were read ahead, from another position
        resumed.restore(before.state())
        assert [rows(next(resumed)) for _ in range(12 - step)] == batches[step:]
