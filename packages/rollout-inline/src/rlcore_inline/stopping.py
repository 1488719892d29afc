"""End tokens and stop strings, which end a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

MAX_CHARACTER_BYTES = 4
"""Bytes of the longest UTF-8 character, hence the maximum number of tokens of one character."""


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return the model's end-of-sequence tokens: those of its generation settings, else of its configuration."""
    for config in (model.generation_config, model.config.get_text_config()):
        tokens = getattr(config, "eos_token_id", None)
        if tokens is not None:
            return frozenset([tokens] if isinstance(tokens, int) else tokens)
    return frozenset()


class StopStrings:
    """Finds stop strings in the text of one completion, token by token.

    Each token is decoded together with the previous ones, because the text of a token may depend on its predecessor.
    Text that ends within a character is decoded with the following token.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any) -> None:
        self._stops = stops
        self._tokenizer = tokenizer
        self._reach = max(map(len, stops)) - 1
        self.restart([])

    def restart(self, tokens: Sequence[int]) -> None:
        """Start again with ``tokens``, which contain no stop string."""
        self._context: list[int] = []  # tokens whose text is known
        self._fresh: list[int] = []  # tokens whose text is incomplete
        self._tail = ""  # the last characters, which may be the beginning of a stop string
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> bool:
        """Add ``token``; return True if it completes a stop string."""
        self._fresh.append(token)
        before = self._decode(self._context)
        text = self._decode(self._context + self._fresh)
        if text.endswith("�") and len(self._fresh) < MAX_CHARACTER_BYTES:
            return False
        tail = self._tail + text[len(before) :]
        self._tail = tail[-self._reach :] if self._reach else ""
        self._context, self._fresh = self._fresh, []
        return any(stop in tail for stop in self._stops)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
