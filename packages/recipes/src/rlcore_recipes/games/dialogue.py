"""Text and tokens of a game: moves are read from answers, and states are written as messages of the user."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from rlcore.engines import ModelSettings
from rlcore.errors import DataError
from rlcore_recipes.data.chat import Renderer
from rlcore_recipes.data.end_tokens import end_of_turn
from rlcore_recipes.data.settings import DataSettings
from rlcore_recipes.data.tokenizer import load_tokenizer

_ANSWER = "[answer]"


@dataclass
class Dialogue:
    """Turns of a conversation as tokens. What was sampled is never encoded again.

    Attributes:
        end: token with which the chat template ends an answer.
    """

    renderer: Renderer
    end: int
    _turns: dict[str, list[int]] = field(default_factory=dict)

    def move(self, tokens: Sequence[int]) -> str | None:
        """Return the move that a completion names in brackets, the last one; None for none."""
        found = re.findall(r"\[([^\[\]]*)\]", self.renderer.tokenizer.decode(tokens, skip_special_tokens=True))
        return found[-1].strip() if found else None

    def answer(self, move: str) -> list[int]:
        """Return the tokens of an answer with ``move``, its end included."""
        return [*self._encode(f"[{move}]"), self.end]

    def turn(self, answer: Sequence[int], text: str) -> list[int]:
        """Return the tokens between ``answer`` and the next one: a message of the user with ``text``."""
        ended = answer[-1] == self.end  # not where a stop string ended it
        return self._after_end(text) if ended else [self.end, *self._after_end(text)]

    def _after_end(self, text: str) -> list[int]:
        if text not in self._turns:
            messages = [
                {"role": "user", "content": "question"},
                {"role": "assistant", "content": _ANSWER},
                {"role": "user", "content": text},
            ]
            written = self.renderer.chat_text(messages, "the turns of a game", add_generation_prompt=True)
            tokens = self._encode(written.rpartition(_ANSWER)[2])
            self._turns[text] = tokens[1:] if tokens[:1] == [self.end] else tokens  # shift allowed: the sampled end
        return self._turns[text]

    def _encode(self, text: str) -> list[int]:
        return self.renderer.encode([text], ["a turn of a game"])[0]


def dialogue_of(model: ModelSettings, data: DataSettings) -> Dialogue:
    """Return the dialogue with the tokenizer of ``model``; a process makes it once.

    Raises:
        DataError: the tokenizer has no chat template, or one without an end of answers.
    """
    return _dialogue(model.model_dump_json(), data.model_dump_json())


@cache
def _dialogue(model: str, data: str) -> Dialogue:
    settings = DataSettings.model_validate_json(data)
    tokenizer: Any = load_tokenizer(ModelSettings.model_validate_json(model))
    renderer = Renderer(settings, tokenizer)
    end = end_of_turn(renderer) if tokenizer.chat_template else None
    if end is None:
        raise DataError(
            "self-play needs a tokenizer whose chat template ends every answer with a special token; that of "
            f"model.path={ModelSettings.model_validate_json(model).path} has none"
        )
    return Dialogue(renderer, end)


def chooser(seed: int) -> random.Random:
    """Return the generator of an opponent's choices in the game with ``seed``."""
    return random.Random(f"opponent {seed}")
