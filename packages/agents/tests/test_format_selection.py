"""Which renderer the conversations of a model use, and what mistakes say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlcore.config import Config
from rlcore.engines import ModelSettings, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeSpec
from rlcore.errors import ConfigError, DataError
from rlcore_agents.conversation import ConversationSettings, chat_format, format_for
from rlcore_kit.testing.tiny_model import CHAT_TEMPLATE, tiny_tokenizer

QUESTION = [{"role": "user", "content": "2+3?"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip


def qwen_tokenizer(template: str | None = CHATML) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN), "eos_token": "<|im_end|>"})
    tokenizer.chat_template = template
    return tokenizer


def spec(path: Path, options: Config | None = None, **fields: Any) -> EpisodeSpec:
    return EpisodeSpec(
        ModelSettings(path=str(path)),
        options or ConversationSettings(),
        SamplingParams(max_tokens=8),
        EpisodeLimits(4, 64, 128, 10),
        **fields,
    )


def test_the_format_of_a_model_is_made_once_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "policy"
    tiny_tokenizer().save_pretrained(policy)
    chat = chat_format(spec(policy, end_tokens=frozenset({7})))
    assert chat_format(spec(policy, end_tokens=frozenset({7}), purpose="validation")) is chat
    assert capsys.readouterr().err == (
        "conversations are rendered with the model's chat template (tool calls as text, in the syntax of Hermes)\n"
    )
    assert set(chat.stop_tokens) == {1, 7}
    other = chat_format(spec(policy, chat_template=CHAT_TEMPLATE.replace("<|user|>", "U:").replace("<|{{", "{{")))
    assert other is not chat
    assert other.prompt(QUESTION) != chat.prompt(QUESTION)


@pytest.mark.parametrize(
    ("model", "renderer", "expected"),
    [
        ("Qwen/Qwen3-0.6B", "auto", "qwen3"),
        ("me/my-qwen3", "auto", "template"),
        ("me/my-qwen3", "qwen3", "qwen3"),
        ("Qwen/Qwen3-0.6B", "template", "template"),
    ],
)
def test_only_exact_names_and_settings_take_a_renderer_written_by_hand(
    model: str, renderer: str, expected: str
) -> None:
    tokenizer = qwen_tokenizer()
    chat = format_for(tokenizer, renderer, model)
    assert expected in chat.name
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert chat.prompt(QUESTION) == tokenizer.encode(text, add_special_tokens=False)


def test_a_renderer_that_disagrees_with_the_template_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = qwen_tokenizer(CHATML.replace("assistant\n", "assistant\n\n"))
    assert "template" in format_for(tokenizer, model="Qwen/Qwen3-8B").name
    assert "writes a question as '<|im_start|>user\\nprobe question" in caplog.text
    with pytest.raises(ConfigError, match="set renderer to template"):
        format_for(tokenizer, "qwen3")


@pytest.mark.parametrize(("variables", "end"), [({}, "assistant\n"), ({"enable_thinking": False}, "</think>\n\n")])
def test_variables_of_the_template_reach_both_kinds(variables: Mapping[str, Any], end: str) -> None:
    tokenizer = qwen_tokenizer()
    by_hand, template = (format_for(tokenizer, name, variables=variables) for name in ("qwen3", "template"))
    assert by_hand.prompt(QUESTION) == template.prompt(QUESTION)
    assert tokenizer.decode(template.prompt(QUESTION)).endswith(end)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"renderer": "qwen33"},
            "there is no renderer 'qwen33'; did you mean qwen3.*known are auto, template, deepseek",
        ),
        ({"renderer": "llama-3"}, "the hand-written renderer llama-3 does not fit the model's tokenizer"),
        ({"renderer": "qwen3", "variables": {"thinking": True}}, "qwen3 does not fit .* data.chat_template_kwargs"),
        ({"chat_template": "{{ 1 +"}, "the chat template fails .*unexpected 'end of template'"),
    ],
)
def test_mistakes_are_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as error:
        format_for(qwen_tokenizer(), **arguments)
    assert "\n" not in str(error.value)


def test_a_model_without_a_chat_template_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the tokenizer of base has no chat template; use a chat model"):
        format_for(qwen_tokenizer(None), model="base")


def test_a_conversation_that_the_template_refuses_is_an_error() -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chat = format_for(qwen_tokenizer(refusal + CHATML))
    with pytest.raises(DataError, match=r"the chat template fails on this conversation: .*no system"):
        chat.prompt([{"role": "system", "content": "x"}, *QUESTION])
    with pytest.raises(DataError, match="role 'user' has parts that are not text"):
        chat.prompt([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}])
