"""Reading and comparing mathematical answers with math-verify; imported in workers only.

math-verify's own time limits are switched off: they are alarms, which a long operation in C never sees, and they turn
"too slow" into "wrong" without a trace. The pool's limit kills the worker and is counted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from rlcore.engines.reward import RewardResult, RewardSample
from rlcore_rewards.reply import WorkerFailure

_LATEX = LatexExtractionConfig(boxed_match_priority=0)
_EXPRESSION = ExprExtractionConfig()
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")


def load(options: Mapping[str, Any]) -> Callable[[RewardSample], RewardResult]:
    """The scoring function for the fields of `rlcore_rewards.math.MathOptions`."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs whole completions
    return lambda sample: score(sample, **options)


def score(sample: RewardSample, extraction: str, max_chars: int, format_score: float) -> RewardResult:
    gold = parse_ground_truth(sample.ground_truth)
    text = sample.completion[-max_chars:]
    boxed = last_boxed(text)
    if boxed is not None:
        answer = _parse(f"\\boxed{{{boxed}}}", _LATEX)
    elif extraction == "any":
        answer = _parse(text, _LATEX, _EXPRESSION)
    else:
        answer = []
    correct = bool(answer) and verify(gold, answer, timeout_seconds=None)
    extras = {"correct": float(correct), "answered": float(bool(answer))}
    return RewardResult(1.0 if correct else format_score if answer else 0.0, extras, str(answer[0]) if answer else None)


def parse_ground_truth(ground_truth: Any) -> list[Any]:
    r"""The expressions of a gold answer: plain LaTeX ("\frac{1}{2}"), or a solution with \boxed{} or "#### number".

    Raises:
        WorkerFailure: nothing can be read from it.
    """
    text = "" if ground_truth is None else str(ground_truth)
    boxed = last_boxed(text)
    if boxed is None:
        boxed = text.rpartition("####")[2].strip().strip("$")
    gold = _parse(f"\\boxed{{{boxed}}}", _LATEX)
    if not gold:
        raise WorkerFailure("ground_truth", f"no expression can be read from the ground truth {text[:100]!r}")
    return gold


def last_boxed(text: str) -> str | None:
    r"""What stands between the braces of the \boxed{} or \fbox{} that opens last among the closed; None without one."""
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
