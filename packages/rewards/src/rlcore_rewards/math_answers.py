"""Read and compare mathematical answers with math-verify; imported in workers only.

math-verify's time limits are switched off: they are alarms, which do not interrupt a long operation in C, and they
silently turn "too slow" into "wrong". The pool's limit kills the worker and is counted.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from rlcore.engines.reward import RewardResult, RewardSample
from rlcore_kit.worker.process import WorkerFailure

_LATEX = LatexExtractionConfig(boxed_match_priority=0)
_EXPRESSION = ExprExtractionConfig()
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")
_WORDS = re.compile(r"[A-Za-z]+(?:\s+[A-Za-z]+)*")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|emph|operatorname)\s*\{([^{}]*)\}\s*\.?")


def load(options: Mapping[str, Any]) -> Callable[[RewardSample], RewardResult]:
    """Return the scoring function for the fields of `rlcore_rewards.math.MathOptions`."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs whole completions
    return lambda sample: score(sample, **options)


def score(sample: RewardSample, extraction: str, max_chars: int, format_score: float) -> RewardResult:
    """Score a sample; the arguments are those of `rlcore_rewards.math.MathOptions`.

    Raises:
        WorkerFailure: the ground truth cannot be read.
    """
    golds = read_ground_truth(sample.ground_truth)
    text = sample.completion[-max_chars:]
    boxed = last_boxed(text)
    if boxed is not None:
        answer = _parse(f"\\boxed{{{boxed}}}", _LATEX)
    elif extraction == "any":
        answer = _parse(text, _LATEX, _EXPRESSION)
    else:
        answer = []
    words = _words(boxed or "")
    correct = bool(answer) and any(_equal(gold, answer, words) for gold in golds)
    extras = {"correct": float(correct), "answered": float(bool(answer))}
    vote = (words or str(answer[0])) if answer else None
    return RewardResult(1.0 if correct else format_score if answer else 0.0, extras, vote)


@dataclass(frozen=True)
class Gold:
    """One right answer.

    Attributes:
        expressions: the answer as math-verify parses it.
        words: the answer in lower case if it consists of words ("no", "no solution"); otherwise None.
    """

    expressions: list[Any]
    words: str | None


def read_ground_truth(ground_truth: Any) -> list[Gold]:
    r"""Read the right answers from a number, a boolean, a text, or a list of these, any of which is right.

    A text is LaTeX ("\frac{1}{2}"), words, or a solution with \boxed{} or "#### answer".

    Raises:
        WorkerFailure: the ground truth is of another type, or holds no expression.
    """
    answers = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not answers:
        raise WorkerFailure("ground_truth", "the ground truth is an empty list; it must hold at least one answer")
    return [_read_answer(answer) for answer in answers]


def _read_answer(answer: Any) -> Gold:
    if not isinstance(answer, str | int | float) or (isinstance(answer, float) and not math.isfinite(answer)):
        raise WorkerFailure(
            "ground_truth",
            f"the ground truth must be a number, a text or a list of these, not {str(answer)[:100]!r} "
            f"({type(answer).__name__})",
        )
    text = str(answer)
    boxed = last_boxed(text)
    if boxed is None:
        boxed = text.rpartition("####")[2].strip().strip("$")
    gold = _parse(f"\\boxed{{{boxed}}}", _LATEX)
    if not gold:
        raise WorkerFailure("ground_truth", f"no expression can be read from the ground truth {text[:100]!r}")
    return Gold(gold, _words(boxed))


def _equal(gold: Gold, answer: list[Any], words: str | None) -> bool:
    # math-verify parses words as the product of their letters, so that "on" would equal "No"
    if gold.words is not None and words is not None:
        return gold.words == words
    return bool(verify(gold.expressions, answer, timeout_seconds=None))


def _words(text: str) -> str | None:
    r"""Return ``text``, or the content of its \text{}, in lower case if it consists of words; otherwise None.

    A single word has at least two letters, one of several words at least three: "a b" and "ab c" are products.
    """
    text = text.strip().strip("$").strip()
    found = _TEXT.fullmatch(text)
    text = (found[1] if found else text).strip().removesuffix(".").rstrip()
    words = text.lower().split()
    if not _WORDS.fullmatch(text) or max(map(len, words)) < min(len(words) + 1, 3):
        return None
    return " ".join(words)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the \boxed{} or \fbox{} that opens last among the closed ones; None without any."""
    open_braces: list[tuple[int, bool]] = []
    best = None
    for brace in _BRACES.finditer(text):
        if brace[0] in ("\\\\", "\\{", "\\}"):
            continue
        if brace[0] != "}":
            open_braces.append((brace.end(), len(brace[0]) > 1))
        elif open_braces:
            start, is_box = open_braces.pop()
            if is_box and (best is None or start > best[0]):
                best = (start, brace.start())
    return text[slice(*best)] if best else None


def _parse(text: str, *targets: Any) -> list[Any]:
    return parse(text, targets, parsing_timeout=None)  # type: ignore[no-any-return]
