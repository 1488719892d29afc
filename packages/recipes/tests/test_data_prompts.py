"""Reading prompts, and what is said about data that does not fit."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlcore.config.load import validate_config
from rlcore.engines import ModelSettings
from rlcore.errors import ConfigError, DataError
from rlcore_kit.testing.tiny_model import tiny_tokenizer
from rlcore_recipes.data.prompts import PromptDataset, load_prompts
from rlcore_recipes.data.settings import DataSettings
from rlcore_recipes.data.tokenizer import load_tokenizer

TOKENIZER = tiny_tokenizer()


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def row(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "ground_truth": "1", "data_source": "src", **more}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*files: str, limit: int | None = None, tokenizer: Any = TOKENIZER, **settings: Any) -> PromptDataset:
    return load_prompts(DataSettings(train_files=list(files), **settings), files, tokenizer, limit)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_chat_prompts_go_through_the_template(tmp_path: Path, ending: str) -> None:
    extra = {"level": 3, "extra_info": {"index": 9, "split": "train"}}
    data = load(write(tmp_path / f"a.{ending}", [row(chat("hello"), **extra), row(chat("hi"), **extra)]))
    assert TOKENIZER.decode(data[0].prompt_tokens) == "<|user|>hello<|end|><|assistant|>"
    assert data[0].messages == chat("hello")
    assert (data[0].ground_truth, data[0].data_source) == ("1", "src")
    assert data[0].extra == {"level": 3, "index": 9, "split": "train"}
    assert [sample.index for sample in data] == [0, 1]
    assert data.file_sizes == [2]


def test_tokens_equal_those_of_the_tokenizers_own_chat_template(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *chat("What is ½ of 9?\n")]
    [sample] = load(write(tmp_path / "a.jsonl", [row(messages)]))
    assert sample.prompt_tokens == TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_plain_text_is_taken_as_it_is(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [row("1+1=")])
    [sample] = load(file)
    assert TOKENIZER.decode(sample.prompt_tokens) == "1+1="
    assert sample.messages == chat("1+1=")
    [sample] = load(file, apply_chat_template="always")
    assert TOKENIZER.decode(sample.prompt_tokens) == "<|user|>1+1=<|end|><|assistant|>"


def test_system_prompt_and_no_template(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [row(chat("q")), row([{"role": "system", "content": "own"}, *chat("q")])])
    first, second = load(file, system_prompt="S")
    assert TOKENIZER.decode(first.prompt_tokens) == "<|system|>S<|end|><|user|>q<|end|><|assistant|>"
    assert second.messages[0]["content"] == "own"
    first, _ = load(file, system_prompt="S", apply_chat_template="never")
    assert TOKENIZER.decode(first.prompt_tokens) == "S\n\nq"


def test_template_gets_its_extra_variables(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if thinking %}<think>{% endif %}"
    [sample] = load(
        write(tmp_path / "a.jsonl", [row(chat("q"))]), tokenizer=tokenizer, chat_template_kwargs={"thinking": True}
    )
    assert tokenizer.decode(sample.prompt_tokens) == "q<think>"


def test_end_token_that_a_tokenizer_appends_is_removed(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A <|end|>", special_tokens=[("<|system|>", 2), ("<|end|>", 1)]
    )
    assert tokenizer("ab")["input_ids"][-1] == tokenizer.eos_token_id
    [sample] = load(write(tmp_path / "a.jsonl", [row("ab")]), tokenizer=tokenizer)
    assert tokenizer.decode(sample.prompt_tokens) == "<|system|>ab"


def test_dotted_keys_reach_into_structs(tmp_path: Path) -> None:
    rows = [{"prompt": chat("q"), "data_source": "s", "reward_model": {"ground_truth": "7", "style": "rule"}}]
    [sample] = load(write(tmp_path / "a.parquet", rows), ground_truth_key="reward_model.ground_truth")
    assert sample.ground_truth == "7"


def test_several_files_and_limit(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", [row(f"{name}{i}") for i in range(3)]) for name in "ab"]
    data = load(*files)
    assert data.file_sizes == [3, 3]
    assert [sample.index for sample in data] == list(range(6))
    assert [TOKENIZER.decode(sample.prompt_tokens) for sample in load(*files, limit=4)] == ["a0", "a1", "a2", "b0"]


def test_source_without_column_is_the_files_name(tmp_path: Path) -> None:
    [sample] = load(write(tmp_path / "riddles.jsonl", [{"prompt": "q"}]), data_source_key=None, ground_truth_key=None)
    assert (sample.data_source, sample.ground_truth) == ("riddles", None)


def test_overlong_prompts_are_filtered_and_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [row("x" * n) for n in (3, 9, 4, 10)])
    data = load(file, max_prompt_length=4)
    assert (len(data), data.filtered, data.file_sizes) == (2, 2, [2])
    assert [sample.index for sample in data] == [0, 1]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([row("x"), row("y" * 9)], {"max_prompt_length": 4, "overlong_prompts": "error"}, r"row 1: .* 9 tokens.*=4"),
        ([row("y" * 9)], {"max_prompt_length": 4}, "none of the 1 prompts .*=4: the shortest has 9"),
        ([row("x"), row(None)], {}, "row 1: the prompt is null"),
        ([row(" ")], {}, "row 0: the prompt is empty"),
        ([row([])], {}, "row 0: the list of messages is empty"),
        ([row([{"role": "user"}])], {}, "row 0, message 0: a message needs 'role' and 'content'"),
        ([row(5)], {}, r"row 0: a prompt is text or a list of messages, not 5 \(int\)"),
        ([row("x", data_source="")], {}, "row 0: column 'data_source' must name the data set, not be ''"),
        ([row("x", data_source="a\ud800")], {}, r"must name the data set, not be 'a\\ud800'"),
        ([row("x", data_source="a\nb")], {}, r"must name the data set, not be 'a\\nb'"),
        ([row(["a"])], {}, r"row 0: a prompt is text or a list of messages, not \['a'\] \(list\)"),
        ([], {}, "has no rows"),
        (
            [{"question": "x", "ground_truth": "1", "data_source": "s"}],
            {},
            r"no column 'prompt', only question, ground_truth, data_source; it has verifiers' 'question': set "
            r"data\.prompt_key=question data\.apply_chat_template=always",
        ),
        (
            [{"prompts": "x", "ground_truth": "1", "data_source": "s"}],
            {},
            r"did you mean data\.prompt_key=prompts\?",
        ),
        (
            [{"prompt": "x", "data_source": "s", "reward_model": {"ground_truth": "1"}}],
            {"ground_truth_key": "ground_truth"},
            r"did you mean data\.ground_truth_key=reward_model\.ground_truth\?",
        ),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, rows: list, settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.jsonl", rows), **settings)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [row("x")])
    with pytest.raises(DataError, match=r"tran\.jsonl does not exist; did you mean .*/train\.jsonl\?"):
        load(str(tmp_path / "tran.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        load(str(tmp_path))
    (tmp_path / "a.xlsx").write_text("prompt\nx\n")
    with pytest.raises(DataError, match=r"ending '\.xlsx'; known are \.parquet, \.jsonl"):
        load(str(tmp_path / "a.xlsx"))
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        load(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1 is a JSON list"):
        load(str(tmp_path / "b.jsonl"))


def test_chat_data_needs_a_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*data\.apply_chat_template=never"):
        load(write(tmp_path / "a.jsonl", [row(chat("q"))]), tokenizer=tokenizer)


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([row("q")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("hub:org/name:main@test", "hub:org/name")) == 2
    assert asked == [("org/name", "main", "test"), ("org/name", None, "train")]


def test_settings_report_all_clashes() -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(DataSettings, {"train_files": ["a", "a"], "weights": [1.0]})
    assert "weights: has 1 numbers for the 2 train_files" in str(caught.value)
    assert "train_files: names a 2 times" in str(caught.value)
    assert DataSettings(train_files="a.parquet").train_files == ["a.parquet"]  # type: ignore[arg-type]


def test_load_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "good")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"model\.path=.* has no tokenizer .*model\.tokenizer_path"):
        load_tokenizer(ModelSettings(path=str(tmp_path / "model")))
    both = ModelSettings(path=str(tmp_path / "model"), tokenizer_path=str(tmp_path / "good"))
    assert load_tokenizer(both)("ab")["input_ids"] == TOKENIZER("ab")["input_ids"]
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json is not JSON"):
        load_tokenizer(ModelSettings(path=str(tmp_path / "model")))
    with pytest.raises(DataError, match=r"model\.path=.*absent: there is no such folder"):
        load_tokenizer(ModelSettings(path=str(tmp_path / "absent")))
