"""Arithmetic of a shell script: integers, names of variables, C's operators."""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any

_BINARY: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_COMPARISONS: dict[type[ast.AST], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_LARGEST = 1 << 63
_DEEPEST = 20  # variables that hold the names of others


def compute(text: str, value: Callable[[str], str], depth: int = 0) -> int:
    """Compute ``text`` as bash does; division truncates towards zero.

    Args:
        value: the text of a variable.

    Raises:
        ValueError: not integer arithmetic, a division by zero, or a number of more than 63 bits.
    """
    if not text.strip():
        return 0
    written = re.sub(r"!(?!=)", " not ", text.replace("&&", " and ").replace("||", " or "))
    written = re.sub(r"\b0+(?=[1-9])", "0o", written)
    try:
        with warnings.catch_warnings(action="ignore"):  # such as of a digit before a word
            tree = ast.parse(written.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("is no integer arithmetic that is read here; write its value") from None

    def of(node: ast.AST) -> int:
        found = _checked(node)
        if abs(found) >= _LARGEST:
            raise ValueError("is too large")
        return found

    def _checked(node: ast.AST) -> int:
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.Name(id=name):
                if depth > _DEEPEST:
                    raise ValueError(f"{name} refers to itself")
                return compute(value(name), value, depth + 1)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -of(inner)
            case ast.UnaryOp(op=ast.UAdd(), operand=inner):
                return of(inner)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return int(not of(inner))
            case ast.BoolOp(op=ast.And(), values=values):
                return int(all(of(inner) for inner in values))
            case ast.BoolOp(op=ast.Or(), values=values):
                return int(any(of(inner) for inner in values))
            case ast.Compare(left=left, ops=[comparison], comparators=[right]):
                return int(_COMPARISONS[type(comparison)](of(left), of(right)))
            case ast.BinOp(left=left, op=op, right=right):
                return _binary(op, of(left), of(right))
        raise ValueError("is no integer arithmetic that is read here; write its value")

    return of(tree)


def _binary(op: Any, left: int, right: int) -> int:
    if type(op) in _BINARY:
        return _BINARY[type(op)](left, right)
    if isinstance(op, (ast.Div, ast.Mod)):
        if right == 0:
            raise ValueError("divides by zero")
        quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
        return quotient if isinstance(op, ast.Div) else left - quotient * right
    if not 0 <= right < 64:
        raise ValueError("is too large")
    if isinstance(op, ast.Pow):
        return int(left**right)
    if isinstance(op, ast.LShift):
        return left << right
    if isinstance(op, ast.RShift):
        return left >> right
    raise ValueError("is no integer arithmetic that is read here; write its value")
