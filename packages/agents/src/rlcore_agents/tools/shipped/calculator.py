"""`calculator`: arithmetic of bounded size. Expressions are parsed and computed here, never evaluated as Python."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

from rlcore_agents.tools.function import function_tool
from rlcore_agents.tools.tool import BadArguments, Tool

MAX_CHARACTERS = 1_000
MAX_BITS = 4_096
"""Size of an integer, of which all digits are computed."""
MAX_FACTORIAL = 400
MAX_DEPTH = 100

Number = int | float
SIGNS = str.maketrans({"^": "**", "×": "*", "·": "*", "÷": "/", "−": "-"})
CONSTANTS = {"pi": math.pi, "e": math.e}
FUNCTIONS: dict[str, Callable[..., Number]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan")},
    **{name: getattr(math, name) for name in ("asin", "acos", "atan", "floor", "ceil", "gcd", "lcm", "radians")},
    "degrees": math.degrees,
    "abs": abs,
    "round": round,
    "min": min,
    "max": max,
    "factorial": lambda n: _factorial(n),
}
OPERATORS: dict[type[ast.AST], Callable[..., Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, exponent: _power(base, exponent),
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def calculator(expression: str) -> str:
    """Compute an arithmetic expression, such as "(3 + 4) * 2 ** 5 / sqrt(2)". Return its value."""
    if len(expression) > MAX_CHARACTERS:
        raise BadArguments(f"the expression has {len(expression)} characters; at most {MAX_CHARACTERS} are allowed")
    try:
        tree = ast.parse(expression.strip().translate(SIGNS), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadArguments(
            f"{expression!r:.200} is not an arithmetic expression ({str(error).split('(')[0]})"
        ) from None
    return _written(_value(tree.body, 0))


def calculator_tool() -> Tool:
    """Return the calculator."""
    return function_tool(calculator)


def _value(node: ast.expr, depth: int) -> Number:
    if depth > MAX_DEPTH:
        raise BadArguments(f"the expression is nested more than {MAX_DEPTH} deep")
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_value(operand, depth + 1)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_value(left, depth + 1), _value(right, depth + 1)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return _bounded(FUNCTIONS[name](*(_value(argument, depth + 1) for argument in arguments)))
    raise BadArguments(
        f"{ast.unparse(node)[:100]!r} is not arithmetic; there are numbers, + - * / // % **, parentheses, "
        f"{', '.join(CONSTANTS)}, and {', '.join(FUNCTIONS)}"
    )


def _bounded(value: object) -> Number:
    if not isinstance(value, int | float):
        raise ValueError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError("the number is too large")
    return value


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise ValueError("the number is too large")
    return base**exponent


def _factorial(n: Number) -> int:
    if n > MAX_FACTORIAL:
        raise ValueError("the number is too large")
    if n != int(n):
        raise ValueError("factorial takes whole numbers")
    return math.factorial(int(n))


def _written(value: Number) -> str:
    """Return a number with 12 digits, in which 0.1 + 0.2 is 0.3; integers with all of theirs."""
    return str(value) if isinstance(value, int) else f"{value:.12g}"
