"""Which tokens supervised samples hold, and which of them are learned."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlcore.errors import DataError, RlcoreWarning
from rlcore_kit.testing.tiny_model import tiny_tokenizer
from rlcore_recipes.data.settings import SFTDataSettings
from rlcore_recipes.data.sft import SFTDataset, load_sft

TOKENIZER = tiny_tokenizer()


def load(path: Path, rows: list[dict[str, Any]], tokenizer: Any = TOKENIZER, **settings: Any) -> SFTDataset:
    path.write_text("".join(json.dumps({"data_source": "s", **row}) + "\n" for row in rows))
    return load_sft(SFTDataSettings(train_files=[str(path)], **settings), [str(path)], tokenizer)


def texts(data: SFTDataset, tokenizer: Any = TOKENIZER) -> list[tuple[str, str]]:
    """Each sample as text, and the part that is learned."""
    batch = data.take(range(len(data)))
    pairs = zip(batch["tokens"].to_list(), batch["loss_mask"].to_list())
    return [(tokenizer.decode(tokens), tokenizer.decode(tokens[mask.bool()])) for tokens, mask in pairs]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_pairs_of_messages_and_response(tmp_path: Path) -> None:
    data = load(tmp_path / "a.jsonl", [{"prompt": [message("user", "1+1?")], "response": "2"}])
    assert texts(data) == [("<|user|>1+1?<|end|><|assistant|>2<|end|>", "2<|end|>")]
    assert data.take([0])["tokens"].values.dtype == torch.int64
    assert data.take([0])["loss_mask"].values.dtype == torch.float32
    assert data.take([0])["data_source"] == ["s"]


@pytest.mark.parametrize("prompt", [[message("user", "1+1?")], "1+1="])
def test_an_answer_that_has_its_end_token_gets_no_second_one(tmp_path: Path, prompt: Any) -> None:
    rows = [{"prompt": prompt, "response": answer} for answer in ("2 ", "2 <|end|>", "2 <|end|>\n<|end|> ")]
    assert [learned for _, learned in texts(load(tmp_path / "a.jsonl", rows))] == ["2 <|end|>"] * 3
    turns = [message("user", "a<|end|>"), message("assistant", "b<|end|>")]
    [(whole, _)] = texts(load(tmp_path / "a.jsonl", [{"messages": turns}], messages_key="messages"))
    assert whole == "<|user|>a<|end|><|end|><|assistant|>b<|end|>", "only answers are changed"


def test_the_templates_end_token_is_learned_and_what_follows_it_is_not(tmp_path: Path) -> None:
    """A chat template that ends turns with another special token than the tokenizer's end token."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|system|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [{"prompt": [message("user", "a")], "response": answer} for answer in ("b", "b<|system|>")]
    data = load(tmp_path / "a.jsonl", rows, tokenizer)
    assert [learned for _, learned in texts(data, tokenizer)] == ["b<|system|>"] * 2
    assert data.ends == {1, 2}


def test_columns_that_are_not_used_are_not_read(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    far = pa.array([2**62 + 1], pa.timestamp("us"))
    table = pa.table({"prompt": ["a"], "response": ["b"], "data_source": ["s"], "created": far})
    pq.write_table(table, tmp_path / "a.parquet")
    settings = SFTDataSettings(train_files=[str(tmp_path / "a.parquet")])
    assert len(load_sft(settings, settings.train_files, TOKENIZER)) == 1
    assert not [warning for warning in recwarn if issubclass(warning.category, RlcoreWarning)]


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
    assert data.take([0])["tokens"].values.tolist() == [0, 1, 3]
    assert data.take([0])["loss_mask"].values.tolist() == [0, 1, 1]


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
        ({"prompt": "a", "response": None}, {}, "row 0: the response must be text, not null"),
        ({"prompt": "a", "response": ""}, {}, "row 0: the response is empty"),
        ({"prompt": "a", "answer": "b"}, {}, r"no column 'response', only data_source, prompt, answer"),
        ({"messages": "text"}, {"messages_key": "messages"}, "row 0: column 'messages' holds text"),
        ({"messages": [message("user", "a")]}, {"messages_key": "messages"}, "row 0: .* no assistant turn"),
        ({"messages": [message("assistant", "a")]}, {"messages_key": "messages"}, "row 0: .* begins with an assistant"),
        ({"prompt": "a", "response": 2}, {}, r"row 0: the response must be text, not 2 \(int\)"),
        ({"prompt": "a", "response": "b\ud800"}, {}, r"row 0: the response holds '.ud800' at character 1"),
        ({"prompt": "a", "response": "b", "data_source": None}, {}, "row 0: column 'data_source' must name"),
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
