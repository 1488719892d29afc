"""What ends a completion: the model's end tokens, and stop strings, found while tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character, hence the most tokens one can be spread over."""


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The model's end-of-sequence tokens: of its generation settings, else of its configuration."""
    for config in (model.generation_config, model.config.get_text_config()):
        tokens = getattr(config, "eos_token_id", None)
        if tokens is not None:
            return frozenset([tokens] if isinstance(tokens, int) else tokens)
    return frozenset()


class StopStrings:
    """Watches one completion's text.

    Tokens are decoded a few at a time, together with the ones before them (the text of a token may depend on its
    predecessor), and text that ends in the middle of a character waits for the rest of it.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any) -> None:
        self._stops = stops
        self._tokenizer = tokenizer
        self._reach = max(map(len, stops)) - 1
        self.restart([])

    def restart(self, tokens: Sequence[int]) -> None:
        """Forget what came, and take ``tokens``, which hold no stop string."""
        self._context: list[int] = []  # tokens whose text is known already
        self._fresh: list[int] = []  # tokens whose text is not complete yet
        self._tail = ""  # the last characters, in which a stop string may have begun
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> bool:
        """Whether a stop string is complete with ``token``."""
        self._fresh.append(token)
        before = self._decode(self._context)
        text = self._decode(self._context + self._fresh)
        if text.endswith("�") and len(self._fresh) < LONGEST_CHARACTER:
            return False
        tail = self._tail + text[len(before) :]
        self._tail = tail[-self._reach :] if self._reach else ""
        self._context, self._fresh = self._fresh, []
        return any(stop in tail for stop in self._stops)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
