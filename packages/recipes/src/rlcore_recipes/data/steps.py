"""Steps of an answer: where each one ends in its tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any


def step_ends(tokens: Sequence[int], tokenizer: Any, separator: str) -> list[int]:
    """Return the index of the last token of each step of an answer.

    Steps are separated by ``separator``; parts without text are no steps. A step ends with the token that holds the
    last character of its separator, wherever the tokenizer put it; the last step ends with the last token of the
    answer. So a step's last token is found in a training sample as it is in a completion. Two steps may end with one
    token.

    Args:
        tokens: of the answer alone. Special tokens have no text.
    """
    pieces = tokenizer.batch_decode(
        [[token] for token in tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    text, reach = "".join(pieces), list(accumulate(map(len, pieces)))
    found: list[int] = []
    start = 0
    while (place := text.find(separator, start)) >= 0:
        end = place + len(separator)
        if text[start:place].strip():
            found.append(bisect_left(reach, end))
        start = end
    if text[start:].strip():
        found.append(len(tokens) - 1)
    return found
