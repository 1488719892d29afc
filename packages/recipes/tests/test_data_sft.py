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


GLM = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_turn_that_the_next_message_ends_is_learned_with_the_token_that_ends_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GLM
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    data = load(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[:2]}], tokenizer)
    assert texts(data, tokenizer) == [
        ("<|user|>a<|assistant|>b<|user|>c<|assistant|>d<|user|>", "b<|user|>d<|user|>"),
        ("<|user|>a<|assistant|>b<|user|>", "b<|user|>"),
    ]
    assert data.ends == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")}


def test_a_template_without_any_end_gets_the_tokenizers_end_token_after_the_last_answer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    [(_, learned)] = texts(load(tmp_path / "a.jsonl", [{"prompt": [message("user", "a")], "response": "b"}], tokenizer))
    assert learned == "b\n<|end|>"


@pytest.mark.parametrize(
    ("learn", "learned"),
    [
        ("answers", ["b<|end|>d<|end|>", "b<|end|>", "2<|end|>"]),
        ("last_answer", ["d<|end|>", "b<|end|>", "2<|end|>"]),
        ("everything", ["a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>d<|end|>"]),
    ],
)
def test_what_is_learned_of_conversations_and_prompts(tmp_path: Path, learn: str, learned: list[str]) -> None:
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    chat = load(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[:2]}], learn=learn)
    plain = load(tmp_path / "b.jsonl", [{"prompt": "1+1=", "response": "2"}], learn=learn)
    found = [part for _, part in texts(chat) + texts(plain)]
    assert found[: len(learned)] == learned
    assert found[-1] == ("+1=2<|end|>" if learn == "everything" else "2<|end|>")


def test_the_last_answer_can_be_learned_under_a_template_that_rewrites_earlier_ones(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last and m['role'] == 'assistant' %}(thought){% endif %}"
        "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    [(whole, learned)] = texts(
        load(tmp_path / "a.jsonl", [{"messages": turns}], tokenizer, learn="last_answer"), tokenizer
    )
    assert learned == "(thought)d<|end|>"
    assert whole == tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_template_that_writes_more_in_one_rendering_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (  # an empty thought in the generation prompt alone
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>(){% endif %}"
    )
    with pytest.raises(DataError, match="does not begin with the generation prompt"):
        load(tmp_path / "a.jsonl", [{"prompt": [message("user", "a")], "response": "b"}], tokenizer)


TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
WITH_TOOLS = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t.function.name }};{% endfor %}{{ hint }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_tools_and_calls_are_written_by_the_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITH_TOOLS
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}
    turns = [message("user", "a"), call, message("user", "2"), message("assistant", "b")]
    row = {"messages": turns, "tools": json.dumps([TOOL]), "chat_template_kwargs": {"hint": "!"}}
    data = load(tmp_path / "a.jsonl", [row, {"messages": turns, "tools": [TOOL]}], tokenizer)
    expected = "<|user|>a<|end|><|assistant|>[add]<|end|><|user|>2<|end|><|assistant|>b<|end|>"
    assert texts(data, tokenizer) == [
        (f"<|system|>add;!<|end|>{expected}", "[add]<|end|>b<|end|>"),
        (f"<|system|>add;<|end|>{expected}", "[add]<|end|>b<|end|>"),
    ]
    table = pa.Table.from_pylist([{"messages": turns, "tools": [TOOL]}, {"messages": turns[:2], "tools": []}])
    pq.write_table(table, tmp_path / "a.parquet")
    settings = SFTDataSettings(train_files=[str(tmp_path / "a.parquet")])
    wholes = [whole for whole, _ in texts(load_sft(settings, settings.train_files, tokenizer), tokenizer)]
    assert wholes == [f"<|system|>add;<|end|>{expected}", "<|user|>a<|end|><|assistant|>[add]<|end|>"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tools": [TOOL]}, "row 0: the tokenizer's chat template does not write the tool 'add'"),
        ({"tools": "[{]"}, "row 0: column 'tools' is not JSON"),
        ({"tools": {"a": 1}}, "row 0: column 'tools' must hold a list of tools"),
        ({"tools": [{"a": 1}]}, "row 0: a tool needs a function with a name"),
        ({"chat_template_kwargs": [1]}, "row 0: column 'chat_template_kwargs' must hold variables by name"),
        ({"chat_template_kwargs": {"tokenize": True}}, "row 0: .* has 'tokenize', which rlcore sets"),
        (
            {"messages": [message("user", "a"), {**message("assistant", "b"), "tool_calls": [TOOL]}]},
            "row 0: the tokenizer's chat template does not write the tool call 'add'",
        ),
        ({"messages": None, "prompt": "a", "response": "b", "tools": [TOOL]}, "row 0: tools are for a chat template"),
    ],
)
def test_tools_that_the_template_cannot_write_are_refused(tmp_path: Path, row: dict, problem: str) -> None:
    row = {"messages": [message("user", "a"), message("assistant", "b")], **row}
    with pytest.raises(DataError, match=problem):
        load(tmp_path / "a.jsonl", [{name: value for name, value in row.items() if value is not None}])


def test_a_sample_of_which_nothing_would_be_learned_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    turns = [message("user", "a"), message("assistant", "b")]
    with pytest.raises(DataError, match="row 0: no token of this sample would be learned"):
        load(tmp_path / "a.jsonl", [{"messages": turns}], tokenizer)


def test_the_learned_share_and_the_samples_left_out_are_noted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "abc", "response": "d"},
        {"prompt": "a" * 9, "response": "c"},
        {"prompt": "a", "response": "bcdefg"},
    ]
    data = load(tmp_path / "a.jsonl", rows, max_length=6, overlong="truncate")
    assert data.notes[-2:] == ["1 samples are cut to data.max_length=6", "63.6% of 11 tokens are learned"]
    assert (data.filtered, data.first_filtered) == (1, f"{tmp_path / 'a.jsonl'}, row 1")
