"""Files made for verl, TRL, OpenRLHF and verifiers: what is recognised, and what is said about the rest."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlcore.config.load import validate_config
from rlcore.errors import ConfigError, DataError
from rlcore_kit.testing.tiny_model import tiny_tokenizer
from rlcore_recipes.data.prompts import PromptDataset, load_prompts
from rlcore_recipes.data.settings import DataSettings, SFTDataSettings
from rlcore_recipes.data.sft import SFTDataset, load_sft

TOKENIZER = tiny_tokenizer()
CHAT = [{"role": "user", "content": "q"}]


def write(path: Path, *rows: dict[str, Any]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(file: str, **settings: Any) -> PromptDataset:
    return load_prompts(DataSettings(train_files=[file], **settings), [file], TOKENIZER)


def samples(file: str, **settings: Any) -> SFTDataset:
    return load_sft(SFTDataSettings(train_files=[file], **settings), [file], TOKENIZER)


def texts(data: SFTDataset) -> list[tuple[str, str]]:
    """Each sample as text, and the part that is learned."""
    batch = data.take(range(len(data)))
    pairs = zip(batch["tokens"].to_list(), batch["loss_mask"].to_list())
    return [(TOKENIZER.decode(tokens), TOKENIZER.decode(tokens[mask.bool()])) for tokens, mask in pairs]


def test_verls_layout_needs_no_keys(tmp_path: Path) -> None:
    row = {
        "data_source": "openai/gsm8k",
        "prompt": CHAT,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 0, "answer": "It is 72"},
    }
    data = prompts(write(tmp_path / "train.parquet", row))
    [sample] = data
    assert (sample.ground_truth, sample.data_source, sample.text) == ("72", "openai/gsm8k", None)
    assert sample.extra == {
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "split": "train",
        "index": 0,
        "answer": "It is 72",
    }
    assert [note.partition(": ")[2] for note in data.notes] == [
        "ground truth from 'reward_model.ground_truth' (verl's layout)"
    ]


def test_two_reference_answers_must_agree(tmp_path: Path) -> None:
    row = {"prompt": "q", "ground_truth": "7", "reward_model": {"ground_truth": "7"}}
    assert prompts(write(tmp_path / "a.jsonl", row))[0].ground_truth == "7"
    file = write(tmp_path / "b.jsonl", row, {**row, "reward_model": {"ground_truth": "8"}})
    with pytest.raises(
        DataError, match=r"row 1: the columns 'ground_truth' and .* '7' and '8'; set data\.ground_truth_"
    ):
        prompts(file)
    assert prompts(file, ground_truth_key="reward_model.ground_truth")[1].ground_truth == "8"


@pytest.mark.parametrize(
    ("columns", "truth"),
    [
        ({"solution": "x = 7"}, "x = 7"),
        ({"answer": "7", "info": {}, "task": "sums"}, "7"),
        ({"label": "7"}, "7"),
        ({"answer": "7", "solution": "x = 7"}, None),
        ({"completion": "c", "label": True}, None),
        ({"target_length": 3}, None),
    ],
)
def test_columns_for_rewards(tmp_path: Path, columns: dict[str, Any], truth: str | None) -> None:
    file = write(tmp_path / "sums.jsonl", {"prompt": "q", **columns})
    data = prompts(file)
    [sample] = data
    assert (sample.ground_truth, sample.data_source, sample.text) == (truth, "sums", "q")
    kept = {name: value for name, value in columns.items() if name != "task"}
    assert kept.items() <= sample.extra.items(), "functions may ask for them by their own names"
    assert data.without_truth is None if truth else data.without_truth.startswith(f"{file}: no ground truth: ")
    assert any("ground truth" in note for note in data.notes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "q", "label": "1"}, r"it has OpenRLHF's 'input': set data\.prompt_key=input$"),
        ({"context_messages": CHAT}, r"OpenRLHF's 'context_messages': set data\.prompt_key=context_messages"),
        ({"question": "q", "answer": "1"}, r"set data\.prompt_key=question data\.apply_chat_template=always"),
        ({"messages": CHAT}, r"set data\.prompt_key=messages if its last turn is the user's"),
        ({"conversations": CHAT}, r"ShareGPT's 'conversations'"),
        ({"chosen": CHAT, "rejected": CHAT}, "is a preference data set without prompts"),
    ],
)
def test_columns_of_others_are_named_in_the_error(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prompts(write(tmp_path / "a.jsonl", row))


def test_reinforcement_learning_says_what_it_leaves_unused(tmp_path: Path) -> None:
    data = prompts(write(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b", "ground_truth": "c"}))
    [note] = data.notes
    assert "'chosen' (TRL's preference format), 'rejected' (TRL's preference format): not trained on" in note
    data = prompts(write(tmp_path / "a.jsonl", {"prompt": "q", "tools": "[]", "ground_truth": "c"}))
    assert [note.partition(": ")[2] for note in data.notes] == [
        "'tools': not given to the chat template, reaches the reward"
    ]


def test_supervised_fine_tuning_says_what_it_does_not_read(tmp_path: Path) -> None:
    row = {"prompt": "q", "completion": "a", "tools": "[]", "extra_info": {"index": 1}}
    assert samples(write(tmp_path / "a.jsonl", row)).notes[0].endswith("a.jsonl: not read: extra_info")


ANSWER = {"role": "assistant", "content": "a"}
TOOL = {"role": "user", "content": "t"}


@pytest.mark.parametrize(
    ("row", "whole", "learned"),
    [
        ({"text": "once"}, "once<|end|>", "nce<|end|>"),
        ({"messages": [*CHAT, ANSWER]}, "<|user|>q<|end|><|assistant|>a<|end|>", "a<|end|>"),
        ({"messages": [*CHAT, ANSWER], "prompt": "q"}, "<|user|>q<|end|><|assistant|>a<|end|>", "a<|end|>"),
        ({"prompt": "q", "completion": "a"}, "qa<|end|>", "a<|end|>"),
        ({"prompt": CHAT, "completion": [ANSWER]}, "<|user|>q<|end|><|assistant|>a<|end|>", "a<|end|>"),
        (
            {"prompt": [*CHAT, ANSWER, *CHAT], "completion": [ANSWER, TOOL, ANSWER]},
            "<|user|>q<|end|><|assistant|>a<|end|>" * 2 + "<|user|>t<|end|><|assistant|>a<|end|>",
            "a<|end|>a<|end|>",
        ),
    ],
)
def test_formats_of_supervised_samples(tmp_path: Path, row: dict[str, Any], whole: str, learned: str) -> None:
    for ending in ("jsonl", "parquet"):
        assert texts(samples(write(tmp_path / f"a.{ending}", row))) == [(whole, learned)]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}, r"alone, set data\.response_key=chosen"),
        ({"chosen": [*CHAT, ANSWER], "rejected": [*CHAT, ANSWER]}, {}, r"data\.messages_key=chosen \(conversations\)"),
        (
            {"prompt": "q", "completion": "a", "messages": [*CHAT, ANSWER]},
            {},
            r"several columns to learn from, 'messages' and 'completion'; set data\.messages_key=messages or",
        ),
        ({"text": ""}, {}, "row 0: the text is empty"),
        ({"text": 5}, {}, "row 0: the text must be text, not 5"),
        ({"prompt": "q", "completion": [TOOL]}, {}, "row 0: the conversation has no assistant turn"),
        ({"prompt": "q", "completion": None}, {}, "row 0: the response must be text, not null"),
        ({"prompt": "q"}, {}, r"no column 'response', only prompt"),
        ({"prompt": "q", "a": "b"}, {"response_key": "c"}, "no column 'c'"),
        (
            {"messages": [{"from": "human", "value": "q"}]},
            {},
            "message 0: .*; rename ShareGPT's 'from' and 'value'",
        ),
    ],
)
def test_supervised_samples_that_do_not_fit(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        samples(write(tmp_path / "a.jsonl", row), **settings)


def test_chosen_answers_are_learned_on_request(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    assert texts(samples(file, response_key="chosen")) == [("qa<|end|>", "a<|end|>")]


def test_samples_come_from_one_kind_of_column() -> None:
    values = {"train_files": ["a"], "messages_key": "m", "text_key": "t"}
    with pytest.raises(ConfigError, match="text_key: cannot be set together with messages_key"):
        validate_config(SFTDataSettings, values)


@pytest.mark.parametrize(
    ("how", "kept"), [("left", "defg"), ("right", "abcd"), ("middle", "abfg"), ("filter", None), ("error", None)]
)
def test_over_long_prompts_are_cut_as_verl_cuts(tmp_path: Path, how: str, kept: str | None) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "x"}, {"prompt": "abcdefg"}, {"prompt": "abcd"})
    if how == "error":
        with pytest.raises(DataError, match=r"row 1: the prompt has 7 tokens.*\(1 of 3 rows do\)"):
            prompts(file, max_prompt_length=4, overlong_prompts=how)
        return
    data = prompts(file, max_prompt_length=4, overlong_prompts=how)
    found = [TOKENIZER.decode(sample.prompt_tokens) for sample in data]
    assert found == ["x", *([kept] if kept else []), "abcd"]
    assert (data.filtered, data.cut) == ((1, 0) if how == "filter" else (0, 1))


def test_an_odd_length_is_cut_in_the_middle_as_verl_cuts(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "abcdefg"})
    [sample] = prompts(file, max_prompt_length=3, overlong_prompts="middle")
    assert TOKENIZER.decode(sample.prompt_tokens) == "afg"  # max_length // 2 tokens, then the rest from the end
