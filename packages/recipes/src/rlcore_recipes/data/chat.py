"""From prompts and conversations to text and token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import DataError
from rlcore_recipes.data.limits import limited
from rlcore_recipes.data.settings import DataFiles

Message = dict[str, Any]

CHUNK = 1000  # texts per call of the tokenizer, which works on them in parallel
LONGEST_TEXT = 1 << 26  # characters that a chat template may make of one conversation


def as_text(value: Any, where: str) -> str:
    """``value`` checked to be text that has an encoding.

    Raises:
        DataError: it is something else; ``where`` names the row and what the text is.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds {value[error.start]!a} at character {error.start}, half of a surrogate pair, which is "
            "no character; write the file as UTF-8"
        ) from None
    return value


def as_prompt(value: Any, where: str, padded: bool = False) -> str | list[Message]:
    """``value`` checked to be text or chat messages, whose contents are text.

    Null fields of messages are left out.

    Args:
        padded: leave null fields of what messages hold (arguments of tool calls …) out too (see `pads_with_nulls`).

    Raises:
        DataError: null, empty, or of another type; ``where`` names the row.
    """
    if value is None:
        raise DataError(f"{where}: the prompt is null")
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: the prompt is empty")
        return as_text(value, f"{where}: the prompt")
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{where}: a prompt is text or a list of messages, not {_shown(value)}")
    if not value:
        raise DataError(f"{where}: the list of messages is empty")
    messages = without_nulls(value) if padded else value
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(messages)]


def without_nulls(value: Any) -> Any:
    """``value`` without the null fields of the structs in it."""
    if isinstance(value, dict):
        return {key: without_nulls(field) for key, field in value.items() if field is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _message(message: Message, where: str) -> Message:
    if message.get("content") is None and message.get("tool_calls"):
        message = {**message, "content": ""}
    if not isinstance(message.get("role"), str) or message.get("content") is None:
        hint = "; rename ShareGPT's 'from' and 'value'" if {"from", "value"} <= message.keys() else ""
        raise DataError(f"{where}: a message needs 'role' and 'content', this one has {_shown(message)}{hint}")
    content = message["content"]
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    kept = {key: field for key, field in message.items() if field is not None}
    return {**kept, "content": as_text(content, f"{where}: the content")}


def _part(part: Any, where: str) -> str:
    """Return the text of one part of a content list."""
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else None
        what = f"of type {kind!r}" if isinstance(kind, str) else _shown(part)
        raise DataError(
            f"{where}: a content list may hold parts {{'type': 'text', 'text': …}} alone, and one is {what}"
        )
    return as_text(part.get("text"), f"{where}: the text of a content part")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{text[:100]}{' …' * (len(text) > 100)} ({type(value).__name__})"


class Renderer:
    """Turns prompts into the text the model sees, as ``settings`` say."""

    def __init__(self, settings: DataFiles, tokenizer: Any) -> None:
        self.settings = settings
        self.tokenizer = tokenizer

    def messages(self, prompt: str | list[Message]) -> list[Message]:
        """Return the conversation with its system prompt; text becomes one user message."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.settings.system_prompt is not None and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.settings.system_prompt}, *messages]
        return messages

    def is_chat(self, prompt: str | list[Message]) -> bool:
        """Return whether the chat template is used for ``prompt``."""
        how = self.settings.apply_chat_template
        return how == "always" or (how == "auto" and not isinstance(prompt, str))

    def prompt_text(self, prompt: str | list[Message], where: str) -> str:
        """Return the prompt up to where the model's answer begins."""
        messages = self.messages(prompt)
        if self.is_chat(prompt):
            return self.chat_text(messages, where, add_generation_prompt=True)
        return "\n\n".join(message["content"] for message in messages)

    def chat_text(
        self,
        messages: list[Message],
        where: str,
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the conversation under the tokenizer's chat template.

        Args:
            variables: for the template, those of the row; they have precedence over ``data.chat_template_kwargs``.

        Raises:
            DataError: the template is missing or broken, refuses the conversation, or takes too long over it.
        """
        from jinja2 import TemplateSyntaxError

        if not self.tokenizer.chat_template:
            raise DataError(
                "the prompts are chat messages but the tokenizer has no chat template; use the tokenizer of a chat "
                "model, or set data.apply_chat_template=never"
            )
        with boundary(f"{where}: the chat template fails on this conversation"), limited():
            try:
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **{**self.settings.chat_template_kwargs, **(variables or {})},
                )
            except TemplateSyntaxError as error:  # its last line is a line number
                raise DataError(
                    f"the tokenizer's chat template is broken in line {error.lineno}: {error.message}"
                ) from error
        if not isinstance(text, str) or len(text) > LONGEST_TEXT:
            what = f"{len(text):,} characters" if isinstance(text, str) else type(text).__name__
            raise DataError(
                f"{where}: the chat template returns {what} for this conversation, not text of up to {LONGEST_TEXT:,} "
                "characters"
            )
        return text

    def prompt_tokens(self, prompts: Sequence[str | list[Message]], places: Sequence[str]) -> list[list[int]]:
        """Token ids of the prompts' texts.

        A chat template writes its special tokens itself; plain text gets those the tokenizer puts in front.

        Args:
            places: file and row of each prompt.
        """
        chat = [self.is_chat(prompt) for prompt in prompts]
        texts = [self.prompt_text(prompt, where) for prompt, where in zip(prompts, places)]
        rows = list(zip(texts, places, chat))
        templated = [(text, where) for text, where, by_template in rows if by_template]
        with_template = iter(self.encode([text for text, _ in templated], [where for _, where in templated]))
        plain = iter(self.encode_plain([(text, where) for text, where, by_template in rows if not by_template]))
        return [next(with_template) if by_template else next(plain) for by_template in chat]

    def encode(self, texts: Sequence[str], places: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, no special tokens added; ``places`` are file and row of each."""
        return self._call(texts, places, add_special_tokens=False)

    def encode_plain(self, rows: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of plain texts, each with its file and row, after what the tokenizer puts in front."""
        end = self.tokenizer.eos_token_id
        texts, places = [text for text, _ in rows], [where for _, where in rows]
        # some tokenizers append the end token, after which a model has nothing more to say
        return [
            # shift allowed: without the end token
            ids[:-1] if ids and ids[-1] == end and not text.endswith(self.tokenizer.eos_token) else ids
            for text, ids in zip(texts, self._call(texts, places, add_special_tokens=True))
        ]

    def _call(self, texts: Sequence[str], places: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        ids: list[list[int]] = []
        for start in range(0, len(texts), CHUNK):
            chunk = slice(start, start + CHUNK)
            try:
                with boundary(f"{places[start]} and the rows after it cannot be tokenised"):
                    ids += self._ids(texts[chunk], add_special_tokens)
            except DataError:
                for text, where in zip(texts[chunk], places[chunk]):
                    as_text(text, f"{where}: the text")
                    with boundary(f"{where}: the tokenizer fails on this text"):
                        self._ids([text], add_special_tokens)
                raise
        return ids

    def _ids(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        # verbose=False: lengths are checked against our own limits, not the tokenizer's
        encoded = self.tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
        return encoded["input_ids"]  # type: ignore[no-any-return]
