"""Which tokens supervised samples hold, and which of them are learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.errors import DataError
from rlcore.testing.tiny_model import tiny_tokenizer
from rlcore_recipes.data.settings import SFTDataSettings
from rlcore_recipes.data.sft import SFTDataset, load_sft

TOKENIZER = tiny_tokenizer()


def load(path: Path, rows: list[dict[str, Any]], tokenizer: Any = TOKENIZER, **settings: Any) -> SFTDataset:
    path.write_text("".join(json.dumps({"data_source": "s", **row}) + "\n" for row in rows))
    return load_sft(SFTDataSettings(train_files=[str(path)], **settings), [str(path)], tokenizer)


def texts(data: SFTDataset, tokenizer: Any = TOKENIZER) -> list[tuple[str, str]]:
    """Each sample as text, and the part that is learned."""
    pairs = zip(data.batch["tokens"].to_list(), data.batch["loss_mask"].to_list())
    return [(tokenizer.decode(tokens), tokenizer.decode(tokens[mask.bool()])) for tokens, mask in pairs]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_pairs_of_messages_and_response(tmp_path: Path) -> None:
    data = load(tmp_path / "a.jsonl", [{"prompt": [message("user", "1+1?")], "response": "2"}])
    assert texts(data) == [("<|user|>1+1?<|end|><|assistant|>2<|end|>", "2<|end|>")]
    assert data.batch["tokens"].values.dtype == torch.int64
    assert data.batch["loss_mask"].values.dtype == torch.float32
    assert data.batch["data_source"] == ["s"]


def test_pairs_of_text_end_with_the_end_token(tmp_path: Path) -> None:
    data = load(tmp_path / "a.jsonl", [{"prompt": "1+1=", "response": "2"}])
    assert texts(data) == [("1+1=2<|end|>", "2<|end|>")]


def test_only_the_response_after_a_longer_prompt_is_learned(tmp_path: Path) -> None:
    prompt = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    [(whole, learned)] = texts(load(tmp_path / "a.jsonl", [{"prompt": prompt, "response": "d"}]))
    assert whole == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>d<|end|>"
    assert learned == "d<|end|>"


def test_every_assistant_turn_of_a_conversation_is_learned(tmp_path: Path) -> None:
    turns = [message("system", "s"), message("user", "a"), message("assistant", "b"), message("user", "c")]
    turns += [message("assistant", "d"), message("user", "left over")]
    data = load(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[:3]}], messages_key="messages")
    (whole, learned), (_, second) = texts(data)
    assert learned == "b<|end|>d<|end|>"
    assert second == "b<|end|>"
    assert whole == TOKENIZER.apply_chat_template(turns[:5], tokenize=False)


def test_what_a_template_writes_after_the_end_token_is_not_learned(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    [(whole, learned)] = texts(
        load(tmp_path / "a.jsonl", [{"messages": turns}], tokenizer, messages_key="messages"), tokenizer
    )
    assert learned == "b<|end|>d<|end|>"
    assert whole == tokenizer.apply_chat_template(turns, tokenize=False)


def test_prompt_tokens_are_those_of_generation(tmp_path: Path) -> None:
    """A tokenizer that would merge across the border must not."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "ab": 2, "<e>": 3}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    assert tokenizer("ab")["input_ids"] == [2]
    data = load(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}], tokenizer)
    assert data.batch["tokens"].values.tolist() == [0, 1, 3]
    assert data.batch["loss_mask"].values.tolist() == [0, 1, 1]


def test_long_samples(tmp_path: Path) -> None:
    rows = [
        {"prompt": "ab", "response": "c"},
        {"prompt": "ab", "response": "c" * 9},
        {"prompt": "a" * 9, "response": "c"},
    ]
    filtered = load(tmp_path / "a.jsonl", rows, max_length=5)
    assert (len(filtered), filtered.filtered, filtered.file_sizes) == (1, 2, [1])
    truncated = load(tmp_path / "a.jsonl", rows, max_length=5, overlong="truncate")
    assert texts(truncated) == [("abc<|end|>", "c<|end|>"), ("abccc", "ccc")]
    assert truncated.filtered == 1  # nothing to learn is left of the third
    with pytest.raises(DataError, match=r"row 1: the sample has 12 tokens, more than data\.max_length=5"):
        load(tmp_path / "a.jsonl", rows, max_length=5, overlong="error")
    with pytest.raises(DataError, match=r"none of the 2 samples .*data\.max_length=5"):
        load(tmp_path / "a.jsonl", rows[1:], max_length=5)


@pytest.mark.parametrize(
    ("row", "settings", "problem"),
    [
        ({"prompt": "a", "response": None}, {}, "row 0: the response must be text, not None"),
        ({"prompt": "a", "response": ""}, {}, "row 0: the response must be text, not ''"),
        ({"prompt": "a", "answer": "b"}, {}, r"no column 'response', only data_source, prompt, answer"),
        ({"messages": "text"}, {"messages_key": "messages"}, "row 0: column 'messages' holds text"),
        ({"messages": [message("user", "a")]}, {"messages_key": "messages"}, "row 0: .* no assistant turn"),
    ],
)
def test_samples_that_do_not_fit(tmp_path: Path, row: dict, settings: dict, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        load(tmp_path / "a.jsonl", [row], **settings)


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (  # like templates that drop the reasoning of earlier turns
        "{% for m in messages %}{{ m['role'] }}:{% if loop.last and m['role'] == 'assistant' %}think {% endif %}"
        "{{ m['content'] }}|{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    with pytest.raises(DataError, match="one row per assistant turn"):
        load(tmp_path / "a.jsonl", [{"messages": turns}], tokenizer, messages_key="messages")
