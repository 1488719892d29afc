"""`gsm8k`: grade-school arithmetic, whose answers are numbers after ``####`` (Cobbe et al., 2021).

The check is a regular expression in linear time, so it runs in the trainer's process instead of the pool.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlcore.config import Config
from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_rewards.tally import Tally

# A minus after a letter, a digit or a bracket is a subtraction. Matching takes linear time whatever the text.
_NUMBER = r"(?:(?<![\w)])-)?\$?(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)"
_MARKED = re.compile(rf"####[ \t]*\$?({_NUMBER})")
_ANY = re.compile(_NUMBER)
_WHOLE = re.compile(rf"\s*\$?({_NUMBER})\.?\s*")

TAIL = 300
"""Number of characters at the end of a completion in which ``strict`` searches the answer; no answer is longer."""


class GSM8KOptions(Config):
    """Options of `gsm8k`."""

    needs_ground_truth: ClassVar[bool] = True

    method: Literal["strict", "flexible"] = Field(
        "strict",
        description=f"'strict': the number after the last #### in the last {TAIL} characters; "
        "'flexible': the last number anywhere.",
    )
    format_score: float = Field(
        0.0, description="Score of a wrong answer in the right format; a right answer scores 1."
    )


def read_answer(completion: str, method: Literal["strict", "flexible"]) -> Decimal | None:
    """Return the number that a completion gives as its answer, or None."""
    if method == "strict":
        numbers = _MARKED.findall(completion[-TAIL:])
    else:
        numbers = _ANY.findall(completion)
    return _value(numbers[-1]) if numbers and len(numbers[-1]) <= TAIL else None


def read_ground_truth(ground_truth: Any) -> Decimal:
    """Return the number of a ground truth: a number, its text, or a gold answer that ends in ``#### number``.

    Raises:
        ValueError: the ground truth has no number.
    """
    text = str(ground_truth)
    marked = _MARKED.findall(text)
    whole = _WHOLE.fullmatch(text)
    if marked:
        return _value(marked[-1])
    if whole:
        return _value(whole[1])
    raise ValueError(f"the ground truth {text[:100]!r} is neither a number nor a text with '#### number'")


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", ""))


class GSM8KReward(Reward):
    """Scores the right number 1, a wrong number ``format_score`` and no number 0.

    Extras: ``correct`` and ``answered``, each 0 or 1.
    """

    def __init__(self, options: GSM8KOptions, settings: RewardSettings) -> None:
        self.options = options
        self._tally = Tally("gsm8k", settings.error_score)

    async def score(self, sample: RewardSample) -> RewardResult:
        try:
            truth = read_ground_truth(sample.ground_truth)
        except ValueError as error:
            return self._tally.failed("ground_truth", str(error))
        answer = read_answer(sample.completion, self.options.method)
        correct = answer == truth
        score = 1.0 if correct else 0.0 if answer is None else self.options.format_score
        extras = {"correct": float(correct), "answered": float(answer is not None)}
        return self._tally.scored(RewardResult(score, extras, None if answer is None else _canonical(answer)))

    def stats(self) -> dict[str, int]:
        return self._tally.stats()


def _canonical(number: Decimal) -> str:
    """Return the same text for equal numbers: "18" for 18, 18.0 and 18.00."""
    text = f"{number or Decimal():f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
