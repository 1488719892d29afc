"""Text to tokens where special tokens in it may have to stay text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from threading import Lock
from typing import Any

from rlcore_agents.conversation.reply import Message, plain

SPLIT = "\ufdd0"
"""A noncharacter of Unicode, which no text has: the text is divided here, and each part is tokenised alone."""


class SplittingTokenizer:
    """A tokenizer that divides texts at `SPLIT`; otherwise the one that it is made from.

    It gives no character offsets, which tells renderers to do without.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = Lock()
        added = sorted((text for text in tokenizer.get_added_vocab() if len(text) > 1), key=len, reverse=True)
        self._added_ids = set(tokenizer.get_added_vocab().values())
        self._added = re.compile("|".join(map(re.escape, added))) if added else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of copies, before they have a tokenizer
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no character offsets")

    def encode(self, text: str, add_special_tokens: bool = False, **kwargs: Any) -> list[int]:
        """Return the tokens of ``text``, in which added tokens divided by `SPLIT` stay text."""
        parts = [part for part in text.split(SPLIT) if part]
        with self._lock:  # a call of a fast tokenizer sets its truncation, which another thread must not meanwhile
            return [
                token
                for part in parts
                for token in self._tokenizer(part, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
            ]

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def is_added(self, token: int) -> bool:
        """Return whether ``token`` is one that text is searched for before it is tokenised, as special tokens are."""
        return token in self._added_ids

    def observations_as_text(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return ``messages`` as text in which special tokens written by tools and environments will stay text.

        That is in every message after the first reply, apart from replies, in which the policy's own special tokens
        stay tokens. Messages before it are the data's, which recipes tokenise in the same way.

        Raises:
            DataError: a content has an image or another part that is not text.
        """
        first = next((index for index, each in enumerate(messages) if each.get("role") == "assistant"), len(messages))
        texts = [plain(message) for message in messages]
        for message in texts[first + 1 :]:
            if message["role"] != "assistant":
                message["content"] = self._divided(message["content"])
        return texts

    def _divided(self, text: str) -> str:
        text = text.replace(SPLIT, "")
        if self._added is None:
            return text
        return self._added.sub(lambda found: found[0][0] + SPLIT + found[0][1:], text)
