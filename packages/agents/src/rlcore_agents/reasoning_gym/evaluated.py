"""Answers that scorers of reasoning-gym 0.1.25 evaluate as Python.

``eval`` and sympy's ``parse_expr`` run whatever the policy writes. Answers of the tasks below are therefore checked
before their scorer sees them.
"""

from __future__ import annotations

import ast
import re

EVAL = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Tasks whose scorers call ``eval``."""

FORMULA = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Tasks whose scorers call ``sympy.parse_expr``."""

FUNCTIONS = frozenset(
    {
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "asinh",
        "acosh",
        "atanh",
    }
    | {"exp", "log", "ln", "sqrt", "abs", "Abs", "pi"}
)
_FORMULA = re.compile(r"[\w\s+\-*/^().,!]*")
_NAME = re.compile(r"[^\W\d]\w*")
_ATTRIBUTE = re.compile(r"\.\s*[^\W\d]")
_WRITTEN = re.compile(r"[A-Za-z]([A-Za-z]|_?\d+)?")


def may_be_evaluated(task: str, answer: str) -> bool:
    """Return whether the scorer of ``task`` can be given ``answer``: evaluating it runs no other code.

    Without parentheses an expression of Python calls nothing. Formulas have numbers, operators, elementary functions,
    and variables of one or two characters.
    """
    if task in EVAL:
        return "(" not in answer or _is_literal(answer)
    if task in FORMULA:
        names = _NAME.findall(answer)
        return (
            _FORMULA.fullmatch(answer) is not None
            and _ATTRIBUTE.search(answer) is None
            and all(name in FUNCTIONS or _WRITTEN.fullmatch(name) for name in names)
        )
    return True


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True
