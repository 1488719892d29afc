"""Data files, chat templates and tokenizers that are damaged, hostile or odd: one sentence that says where."""

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlcore.engines import ModelSettings
from rlcore.errors import DataError, RlcoreWarning
from rlcore_kit.testing.tiny_model import tiny_tokenizer
from rlcore_recipes.data import chat, limits, parquet, text_files
from rlcore_recipes.data.files import Fingerprint, existing_file, read_rows
from rlcore_recipes.data.prompts import PromptDataset, load_prompts
from rlcore_recipes.data.settings import DataSettings
from rlcore_recipes.data.tokenizer import load_tokenizer

USER = [{"role": "user", "content": "q"}]


def rows_of(prompts: list[Any], **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "ground_truth": "1", "data_source": "s", **columns} for prompt in prompts]


def load(file: Path, tokenizer: Any = None, **settings: Any) -> PromptDataset:
    settings = {"train_files": [str(file)], **settings}
    return load_prompts(DataSettings(**settings), [str(file)], tokenizer or tiny_tokenizer())


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- contents of messages -----------------------------------------------------------------------------------------


def test_text_parts_of_a_content_list_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]
    rows = rows_of([[{"role": "user", "content": parts}]])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in (jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        [sample] = load(file)
        assert tiny_tokenizer().decode(sample.prompt_tokens) == "<|user|>1+1<|end|><|assistant|>"
        assert sample.messages == [{"role": "user", "content": "1+1"}]


def test_fields_that_parquet_filled_with_nulls_are_absent(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": 2}}]
    rows = rows_of([[*USER, {"role": "assistant", "content": "", "calls": calls}]])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    texts = [
        tokenizer.decode(load(file, tokenizer)[0].prompt_tokens)
        for file in (tmp_path / "a.parquet", jsonl(tmp_path / "a.jsonl", rows))
    ]
    assert texts[0] == texts[1]
    assert json.loads(texts[0][texts[0].index("}{") + 1 :])["calls"] == calls
    rows[0]["prompt"][1]["calls"][0]["arguments"]["b"] = None
    assert '{"a": 1, "b": null}' in tokenizer.decode(
        load(jsonl(tmp_path / "b.jsonl", rows), tokenizer)[0].prompt_tokens
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([{"type": "text", "text": "a"}, {"type": "image_url"}], "one is of type 'image_url'"),
        (["a"], "one is 'a' (str)"),
        ([{"type": "text", "text": 5}], "the text of a content part must be text, not 5 (int)"),
        ({"text": "a"}, "the content must be text, not {'text': 'a'} (dict)"),
        (7, "the content must be text, not 7 (int)"),
        (True, "the content must be text, not True (bool)"),
        (float("nan"), "the content must be text, not nan (float)"),
        (b"a", "the content must be text, not b'a' (bytes)"),
        ("a\ud800", r"the content holds '\ud800' at character 1"),
    ],
)
def test_content_that_is_no_text_is_refused(tmp_path: Path, content: Any, problem: str) -> None:
    good, bad = rows_of([USER, [*USER, {"role": "user", "content": content}]])
    if isinstance(content, bytes):
        file = tmp_path / "a.parquet"
        bad["prompt"] = bad["prompt"][1:]
        pq.write_table(pa.Table.from_pylist([bad]), file)
        where = "row 0, message 0"
    else:
        file, where = jsonl(tmp_path / "a.jsonl", [good, bad]), "row 1, message 1"
    with pytest.raises(DataError, match=re.escape(f"{file}, {where}: ") + ".*" + re.escape(problem)):
        load(file)


# --- chat templates -----------------------------------------------------------------------------------------------

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('Conversation roles must alternate') }}", "row 0: .*: Conversation roles must alternate"),
        ("{{ messages[0].tools.name }}", "row 0: .*'dict object' has no attribute 'tools'"),
        ("{% for m in messages %}", r"template is broken in line 1: Unexpected end of template"),
        ("{{ messages | nothing }}", "template is broken in line 1: No filter named 'nothing'"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "row 0: .*RecursionError"),
        (ENDLESS, r"row 0: .*does not end within 0\.2 seconds"),
        ("{{ (10**(10**7)) % 7 }}", r"row 0: .*does not end within 0\.2 seconds"),
        ("{{ 'x' * 10**11 }}", "row 0: .*asks for more than 1024 MiB of memory"),
        ("{{ 'x' * 2000 }}", "row 0: the chat template returns 2,000 characters"),
    ],
)
def test_templates_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, problem: str) -> None:
    if "does not end" in problem:
        monkeypatch.setattr(limits, "CPU_SECONDS", 0.2)
    monkeypatch.setattr(chat, "LONGEST_TEXT", 1000)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=problem) as caught:
        load(jsonl(tmp_path / "a.jsonl", rows_of([USER])), tokenizer)
    assert "\n" not in str(caught.value)


def test_limits_leave_no_trace(tmp_path: Path) -> None:
    import resource
    import signal

    def state() -> tuple[Any, ...]:
        timer = signal.getitimer(signal.ITIMER_VIRTUAL)
        return resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM), timer

    before = state()
    with limits.limited():
        assert state() != before
    assert state() == before
    found = []
    file = jsonl(tmp_path / "a.jsonl", rows_of([USER]))
    thread = threading.Thread(target=lambda: found.append(len(load(file))))
    thread.start()
    thread.join()
    assert found == [1], "data can be read in another thread than the main one"


def test_the_row_that_a_tokenizer_fails_on_is_named(tmp_path: Path) -> None:
    class Panic(BaseException):
        """As that of a tokenizer written in Rust."""

    class Fragile:
        chat_template = None
        eos_token_id = None
        eos_token = None

        def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
            if "bad" in texts:
                raise Panic("index out of bounds")
            return {"input_ids": [[1] for _ in texts]}

    file = jsonl(tmp_path / "a.jsonl", rows_of(["a", "b", "bad"]))
    with pytest.raises(DataError, match="row 2: the tokenizer fails on this text: Panic: index out of bounds"):
        load(file, Fragile())


# --- Parquet ------------------------------------------------------------------------------------------------------


def test_row_groups_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([USER] * 10, extra_info={"tests": ["x" * 100, "y" * 100]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    assert read_rows(tmp_path / "a.parquet") == rows
    sizes: list[int] = []
    original = pq.ParquetFile.iter_batches

    def counted(self: Any, size: int, **options: Any) -> Any:
        if size > 1 and not sizes:
            sizes.append(size)
            raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")
        sizes.append(size)
        return original(self, size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert read_rows(tmp_path / "a.parquet") == rows
    assert sizes == [4, 1, 4, 2], "single rows where Arrow cannot hold a batch"
    sizes[:] = [0]
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1)
    assert len(load(tmp_path / "a.parquet")) == 10
    assert sizes[1:] == [1, 1, 1]
    data = load_prompts(DataSettings(train_files=["-"]), [str(tmp_path / "a.parquet")], tiny_tokenizer(), limit=3)
    assert (len(data), len(sizes)) == (3, 5), "no more is read than wanted"


def test_a_damaged_column_is_named(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["q"] * 50, "ground_truth": [str(number) for number in range(50)]})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    chunk = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(1)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = (
        b"\xff" * chunk.total_compressed_size
    )
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet, column 'ground_truth' of row group 0 cannot be read: "):
        load(tmp_path / "a.parquet", data_source_key=None)


def test_times_beyond_pythons_datetime_become_text(tmp_path: Path) -> None:
    far = pa.array([2**62 + 1, 0], pa.timestamp("us"))
    nested = pa.array(
        [{"at": 2**62 + 1, "of": [1]}, None], pa.struct({"at": pa.timestamp("ns"), "of": pa.list_(pa.time64("ns"))})
    )
    table = pa.table(
        {"prompt": ["q", "r"], "ground_truth": ["1", "2"], "data_source": ["s", "s"], "far": far, "extra_info": nested}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.warns(RlcoreWarning, match="times in column extra_info, far do not fit") as caught:
        first, second = load(tmp_path / "a.parquet")
    assert len(caught) == 1
    assert first.extra["at"] == "2116-02-20 23:53:38.427387905"
    assert isinstance(first.extra["far"], str)
    assert first.extra["of"] == ["00:00:00.000000001"]
    assert second.extra["far"].year == 1970


def test_equal_names_of_columns(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"]), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match="more than one column 'prompt'"):
        load(tmp_path / "a.parquet")


# --- JSONL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "\xff"}', "line 2 is not JSON in UTF-8: UnicodeDecodeError"),
        (b"[" * 100_000, "line 2 is not JSON in UTF-8: RecursionError"),
        (b'{"prompt": NaN,}', "line 2 is not JSON"),
        (b'{"prompt": "' + b"x" * 5000 + b'"}', "line 2 is longer than 0 MiB"),
        ('{"prompt": "x"}'.encode("utf-16"), "line 2 is not JSON"),
    ],
)
def test_lines_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, problem: str) -> None:
    if b"xxx" in line:
        monkeypatch.setattr(text_files, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(json.dumps(rows_of(["q"])[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=problem):
        load(tmp_path / "a.jsonl")


def test_integers_of_many_digits_become_text(tmp_path: Path) -> None:
    line = '{"prompt": "q", "ground_truth": 12, "data_source": "s", "n": ' + "9" * 5000 + "}\n"
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())  # with the mark that Windows puts in front
    with pytest.warns(RlcoreWarning, match="integers of 1 lines have more digits"):
        [sample] = load(tmp_path / "a.jsonl")
    assert (sample.ground_truth, sample.extra["n"]) == (12, "9" * 5000)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.parquet").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.parquet"):
        with pytest.raises(DataError, match="is not a regular file"):
            load(tmp_path / name)
    with pytest.raises(DataError, match=r"cannot be read: OSError: .*File name too long"):
        load(tmp_path / ("x" * 300 + ".jsonl"))
    with pytest.raises(DataError, match=r"^data file s3://bucket/a\.parquet is a URL; copy it"):
        existing_file("s3://bucket/a.parquet")


def fingerprint(rows: list[dict[str, Any]]) -> str:
    made = Fingerprint("a")
    made.add(rows[:1])
    made.add(rows[1:])
    return made.hex()


def test_fingerprints_tell_contents_apart(tmp_path: Path) -> None:
    rows = rows_of([USER, USER], extra_info={"tests": [1.5, None]})
    other = rows_of([USER, USER], extra_info={"tests": [1.5, 0.0]})
    prints = {fingerprint(some) for some in (rows, json.loads(json.dumps(rows)), other, rows[:1])}
    assert len(prints) == 3
    assert fingerprint([{"x": object()}]) == fingerprint([{"x": object()}]), "no addresses"


# --- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 261}))
    return folder


WRONG_TYPE = '{"model_type": "qwen2", "rms_norm_eps": "x"}'


def _without_vocabulary(content: str) -> str:
    values = json.loads(content)
    values["model"]["vocab"], values["added_tokens"] = {}, []
    return json.dumps(values)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("tokenizer.json", lambda content: content[: len(content) // 2], "tokenizer.json is not JSON in UTF-8"),
        (
            "tokenizer.json",
            lambda content: content.replace('"BPE"', '"NewKind"'),
            "the tokenizer in .* cannot be loaded",
        ),
        ("tokenizer.json", lambda content: "[" * 100_000, "tokenizer.json is not JSON in UTF-8: RecursionError"),
        ("tokenizer.json", lambda content: "5", "the tokenizer in .* cannot be loaded"),
        ("tokenizer.json", _without_vocabulary, "has an empty vocabulary"),
        ("tokenizer_config.json", lambda content: "[]", "the tokenizer in .* cannot be loaded"),
        ("tokenizer_config.json", lambda content: '{"tokenizer_class": 7}', "the tokenizer in .* cannot be loaded"),
        ("config.json", lambda content: WRONG_TYPE, "config.json cannot be used: .*'rms_norm_eps'"),
        ("config.json", lambda content: "\ud800", "config.json is not JSON in UTF-8: UnicodeDecodeError"),
    ],
)
def test_damaged_tokenizer_folders(
    good_folder: Path, tmp_path: Path, name: str, change: Callable[[str], str], problem: str
) -> None:
    for file in good_folder.iterdir():
        content = file.read_text()
        content = change(content) if file.name == name else content
        (tmp_path / file.name).write_text(content, errors="surrogatepass")
    with pytest.raises(DataError, match=problem) as caught:
        load_tokenizer(ModelSettings(path=str(tmp_path)))
    assert f"model.path={tmp_path}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_tokenizer_folders_that_cannot_be_read(good_folder: Path, tmp_path: Path, make: Callable[[Path], None]) -> None:
    with pytest.raises(DataError, match="File name too long"):
        load_tokenizer(ModelSettings(path="x" * 5000))
    (tmp_path / "tokenizer.json").write_text((good_folder / "tokenizer.json").read_text())
    make(tmp_path / "tokenizer_config.json")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not a regular file"):
        load_tokenizer(ModelSettings(path=str(tmp_path)))
