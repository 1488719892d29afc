"""The bytes of every token of a tokenizer, and text to tokens without anything added.

What a token adds to a text is decided by the tokenizer's decoder: byte-level BPE writes bytes as printable characters,
SentencePiece writes spaces as ``▁`` and bytes without a token as ``<0xE2>``, WordPiece writes continuations as
``##ing``. Decoding tokens one by one would lose the bytes of characters that several tokens share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import DataError

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
READ = ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece", "BPEDecoder")
"""Decoders of the library tokenizers (0.23) that are understood."""


class TokenBytes:
    """A tokenizer as a table of bytes.

    Attributes:
        special: ids of special tokens; their text is no part of what a model says.

    Args:
        tokenizer: a tokenizer of transformers over the library tokenizers.
        name: for messages.

    Raises:
        DataError: it is of another kind, or its decoder is not understood.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "to_str"):
            raise DataError(
                f"{name} is no tokenizer of the library tokenizers (tokenizer.json), so the bytes of its tokens are "
                "not known; take a model with a tokenizer.json"
            )
        with boundary(f"{name}: its tokenizer.json cannot be read"):
            described = json.loads(backend.to_str())
            decoder = described["decoder"]
            self._steps = [] if decoder is None else decoder.get("decoders", [decoder])
        for step in self._steps:
            if step["type"] not in READ:
                raise DataError(f"{name}: the decoder {step['type']} of its tokenizer.json is not supported")
        kinds = {step["type"] for step in self._steps}
        self._words = (
            decoder is None or "WordPiece" in kinds
        )  # tokens are words, with a space before each but the first
        added = tokenizer.added_tokens_decoder
        self.special = frozenset([*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)])
        alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        self._table = {
            id: self._bytes(token, alphabet) for token, id in tokenizer.get_vocab().items() if id not in added
        }
        self._table |= {id: token.content.encode() for id, token in added.items()}
        self._encoder = _exact_encoder(described)

    def of(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token of a text.

        Raises:
            KeyError: no token has an id.
        """
        found = [self._table[token] for token in tokens]
        if self._words and found and found[0][:1] == b" ":
            found[0] = found[0][1:]
        return found

    def encode(self, text: str) -> list[int] | None:
        """Return the tokens of ``text`` where it continues another one; None if the tokenizer changes it.

        Names of special tokens in it are text.
        """
        tokens: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return tokens if b"".join(self.of(tokens)) == text.encode() else None

    def specials_named_as(self, other: TokenBytes) -> dict[int, int]:
        """Return the special tokens of this tokenizer by the special tokens of ``other`` that have the same name."""
        names = {self._table[token]: token for token in self.special}
        return {token: names[name] for token in other.special if (name := other._table[token]) in names}

    def _bytes(self, token: str, alphabet: dict[str, int] | None) -> bytes:
        if alphabet is not None:
            known = [alphabet.get(character) for character in token]
            return token.encode() if None in known else bytes(known)  # type: ignore[arg-type]
        for step in self._steps:
            match step["type"]:
                case "ByteFallback" if byte := BYTE.fullmatch(token):
                    return bytes([int(byte[1], 16)])
                case "Replace" if "String" in step["pattern"]:
                    token = token.replace(step["pattern"]["String"], step["content"])
                case "Metaspace":
                    token = token.replace(step["replacement"], " ")
                case "WordPiece":
                    prefix = step["prefix"]
                    token = token[len(prefix) :] if token.startswith(prefix) else f" {token}"
                case "BPEDecoder":
                    token = token.replace(step["suffix"], " ")
        return (token if self._steps else f" {token}").encode()


def _byte_alphabet() -> dict[str, int]:
    """Return the byte for each character of byte-level BPE; printable ones are themselves, others follow 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _exact_encoder(described: dict[str, Any]) -> Any:
    """Return a tokenizer that adds no space before a text, and knows special tokens as text only."""
    from tokenizers import Tokenizer

    described = dict(described)
    described["normalizer"] = _without_prefix(described["normalizer"], "normalizers")
    described["pre_tokenizer"] = _without_prefix(described["pre_tokenizer"], "pretokenizers")
    described["truncation"] = described["padding"] = None
    described["post_processor"] = None
    special = {token["content"] for token in described["added_tokens"] if token["special"]}
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["special"]]
    if described["model"]["type"] == "Unigram":  # would find special tokens among its pieces
        pieces = described["model"]["vocab"]
        hidden = [[f"\0{index}" if name in special else name, score] for index, (name, score) in enumerate(pieces)]
        described["model"] = {**described["model"], "vocab": hidden}
    return Tokenizer.from_str(json.dumps(described))


def _without_prefix(step: dict[str, Any] | None, parts: str) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if parts in step:
        kept = [part for one in step[parts] if (part := _without_prefix(one, parts)) is not None]
        return {**step, parts: kept} if kept else None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step
