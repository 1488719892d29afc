"""A tiny model with random weights and a chat template that knows tools."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlcore_recipes.small_model.qwen2 import SmallModelSettings, write_small_model

CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ 'user' if message.role == 'tool' else message.role }}|>{{ message.content }}"
    '{% for call in message.tool_calls or [] %}<tool_call>{"name": {{ call.function.name | tojson }}, "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(folder: Path, conversations: Iterable[Mapping[str, Any]], **sizes: int) -> None:
    """Write a model of about 120,000 parameters, whose tokenizer is made for these conversations."""
    texts = [text for row in conversations for message in row["messages"] for text in _texts(message)]
    defaults = {"vocab_size": 320, "hidden_size": 64, "layers": 2, "intermediate_size": 192}
    write_small_model(folder, texts, SmallModelSettings(**{**defaults, **sizes}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _texts(message: Mapping[str, Any]) -> Iterable[str]:
    yield message["content"]
    for call in message.get("tool_calls", ()):
        yield f"<tool_call>{json.dumps(call['function'])}</tool_call>"
