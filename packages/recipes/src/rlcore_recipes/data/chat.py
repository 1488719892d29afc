"""From prompts and conversations to text and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlcore.errors import DataError
from rlcore_recipes.data.settings import DataFiles

Message = dict[str, Any]

CHUNK = 1000  # texts per call of the tokenizer, which works on them in parallel


def as_prompt(value: Any, where: str) -> str | list[Message]:
    """``value`` checked to be text or chat messages.

    Raises:
        DataError: null, empty, or of another type; ``where`` names the row.
    """
    if value is None:
        raise DataError(f"{where}: the prompt is null")
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: the prompt is empty")
        return value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{where}: a prompt is text or a list of messages, not {type(value).__name__}")
    if not value:
        raise DataError(f"{where}: the list of messages is empty")
    for message in value:
        if not isinstance(message.get("role"), str) or message.get("content") is None:
            raise DataError(f"{where}: a message needs 'role' and 'content', this one has {message}")
    # Parquet gives every message all fields of the struct; absent ones are null
    return [{key: field for key, field in message.items() if field is not None} for message in value]


class Renderer:
    """Turns prompts into the text the model sees, as ``settings`` say."""

    def __init__(self, settings: DataFiles, tokenizer: Any) -> None:
        self.settings = settings
        self.tokenizer = tokenizer

    def messages(self, prompt: str | list[Message]) -> list[Message]:
        """The conversation with its system prompt; text becomes one user message."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.settings.system_prompt is not None and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.settings.system_prompt}, *messages]
        return messages

    def is_chat(self, prompt: str | list[Message]) -> bool:
        """Whether the chat template is used for ``prompt``."""
        how = self.settings.apply_chat_template
        return how == "always" or (how == "auto" and not isinstance(prompt, str))

    def prompt_text(self, prompt: str | list[Message]) -> str:
        """The prompt up to where the model's answer begins."""
        messages = self.messages(prompt)
        if self.is_chat(prompt):
            return self.chat_text(messages, add_generation_prompt=True)
        return "\n\n".join(message["content"] for message in messages)

    def chat_text(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """The conversation under the tokenizer's chat template."""
        if not self.tokenizer.chat_template:
            raise DataError(
                "the prompts are chat messages but the tokenizer has no chat template; use the tokenizer of a chat "
                "model, or set data.apply_chat_template=never"
            )
        return self.tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.settings.chat_template_kwargs,
        )

    def prompt_tokens(self, prompts: Sequence[str | list[Message]]) -> list[list[int]]:
        """Token ids of the prompts' texts.

        A chat template writes its special tokens itself; plain text gets those the tokenizer puts in front.
        """
        chat = [self.is_chat(prompt) for prompt in prompts]
        texts = [self.prompt_text(prompt) for prompt in prompts]
        with_template = iter(self.encode([text for text, templated in zip(texts, chat) if templated]))
        plain = iter(self._encode_plain([text for text, templated in zip(texts, chat) if not templated]))
        return [next(with_template) if templated else next(plain) for templated in chat]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, no special tokens added."""
        return self._call(texts, add_special_tokens=False)

    def _encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        end = self.tokenizer.eos_token_id
        # some tokenizers append the end token, after which a model has nothing more to say
        return [
            ids[:-1] if ids and ids[-1] == end and not text.endswith(self.tokenizer.eos_token) else ids
            for text, ids in zip(texts, self._call(texts, add_special_tokens=True))
        ]

    def _call(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        ids: list[list[int]] = []
        for start in range(0, len(texts), CHUNK):
            chunk = list(texts[start : start + CHUNK])
            # verbose=False: lengths are checked against our own limits, not the tokenizer's
            ids += self.tokenizer(chunk, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids
