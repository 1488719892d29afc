"""Stop strings found token by token."""

import pytest

from rlcore_inline.stopping import StopStrings
from rlcore_kit.testing.tiny_model import tiny_tokenizer


class Pieces:
    """A tokenizer whose tokens are whole strings."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(self.pieces[token] for token in tokens)


def ends_at(stops: list[str], tokenizer: object, tokens: list[int]) -> int | None:
    watch = StopStrings(stops, tokenizer)
    return next((index for index, token in enumerate(tokens) if watch.push(token)), None)


@pytest.mark.parametrize(
    ("stops", "end"),
    [
        (["world"], 3),  # across tokens
        (["lo wor"], 2),
        (["H"], 0),
        (["!"], 4),
        (["x", "rld!"], 4),
        (["Hello world!?"], None),
        (["held"], None),
    ],
)
def test_stops_across_tokens(stops: list[str], end: int | None) -> None:
    assert ends_at(stops, Pieces("Hel", "lo ", "wor", "ld", "!"), [0, 1, 2, 3, 4]) == end


@pytest.mark.parametrize("text", ["naïve", "日本語", "a😀b"])
def test_characters_of_several_bytes(text: str) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("so " + text + " it is")
    for stop in (text[1], text[1:], text):
        expected = len(tokenizer.encode("so " + text[: text.index(stop) + len(stop)])) - 1
        assert ends_at([stop], tokenizer, tokens) == expected


def test_bytes_that_are_no_text_do_not_hide_a_stop() -> None:
    tokenizer = tiny_tokenizer()
    lead = tokenizer.encode("日")[0]  # the first byte of three
    assert ends_at(["ab"], tokenizer, [lead] * 9 + tokenizer.encode("xab")) == 11


def test_special_tokens_count_as_text() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("a<|user|>b")
    assert ends_at(["<|user|>"], tokenizer, tokens) == 1
