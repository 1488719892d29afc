"""Generated word problems in GSM8K's format: a question, worked steps, ``#### answer``.

Small enough to be learned from scratch in minutes, and hard enough to leave something to learn: every property that
makes them easier or harder is a field of `ArithmeticTask`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from rlcore.config import Config
from rlcore.errors import DataError
from rlcore_recipes.data.columns import Row
from rlcore_recipes.data.prepare.rows import Splits, prompt_row

Operation = Literal["+", "-", "*"]

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gia",
    "Hugo",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Nils",
    "Olga",
    "Pia",
)
ITEMS = ("apples", "books", "coins", "cards", "pens", "eggs", "stamps", "shells", "beads", "nuts", "keys", "cups")
PHRASES: dict[Operation, tuple[str, ...]] = {
    "+": ("{name} buys {number} more.", "{name} finds {number} more.", "A friend gives {name} {number} more."),
    "-": ("{name} gives {number} away.", "{name} loses {number}.", "A friend takes {number} of them."),
    "*": ("A month later {name} has {number} times as many.", "{name} makes it {number} times as many."),
}
TRIES = 50
"""Draws per problem before the problems of a task count as exhausted."""


class ArithmeticTask(Config):
    """Kind and size of the problems."""

    digits: int = Field(2, ge=1, le=9, description="Maximum digits of the numbers added and subtracted.")
    steps: int = Field(1, ge=1, le=9, description="Operations per problem.")
    operations: tuple[Operation, ...] = Field(
        ("+",), min_length=1, description="Operations to draw from; factors have one digit, no result is negative."
    )
    pad: bool = Field(True, description="Write all numbers of a kind equally long, with leading zeros.")
    columns: bool = Field(False, description="Work every step out digit by digit before its result.")
    annotate: bool = Field(False, description="Repeat every equation in GSM8K's <<…>>.")
    names: int = Field(4, ge=1, le=len(NAMES), description="Different people.")
    items: int = Field(4, ge=1, le=len(ITEMS), description="Different things to count.")
    phrases: int = Field(1, ge=1, le=3, description="Different phrases per operation, as far as there are.")


LEVELS: dict[str, ArithmeticTask] = {
    "easy": ArithmeticTask(),
    "medium": ArithmeticTask(steps=2, operations=("+", "-"), columns=True, phrases=2),
    "hard": ArithmeticTask(
        digits=3, steps=4, operations=("+", "-", "*"), pad=False, names=len(NAMES), items=len(ITEMS), phrases=3
    ),
}


class ArithmeticOptions(Config):
    """Options of ``rlcore data arithmetic``."""

    train: int = Field(8192, ge=1, description="Problems to train on.")
    test: int = Field(512, ge=1, description="Problems to test on, with numbers that no training problem has.")
    seed: int = Field(0, ge=0, description="The same seed makes the same problems.")
    level: Literal["easy", "medium", "hard"] = Field(
        "easy",
        description="easy: one addition; medium: two additions or subtractions, digit by digit; hard: four operations "
        "of three kinds on numbers of up to three digits.",
    )


def arithmetic(options: ArithmeticOptions) -> Splits:
    """Generated word problems in GSM8K's format, from easy to hard."""
    return arithmetic_problems(LEVELS[options.level], options.train, options.test, options.seed)


def arithmetic_problems(task: ArithmeticTask, train: int, test: int, seed: int) -> Splits:
    """Make rows of ``train`` and ``test`` problems.

    No question occurs twice, and no training problem has the numbers and operations of a test problem, whatever its
    words. The test problems are a random sample, and do not depend on how many training problems there are.

    Raises:
        DataError: the task has too few different problems.
    """
    held_out: dict[Any, Problem] = {}
    for problem in _draws(task, f"test {seed}", test):
        if len(held_out) == test:
            break
        held_out.setdefault(problem.numbers, problem)
    questions: dict[str, Problem] = {}
    for problem in _draws(task, f"train {seed}", train):
        if len(questions) == train:
            break
        if problem.numbers not in held_out:
            questions.setdefault(problem.question, problem)
    for split, wanted, found in (("test", test, len(held_out)), ("train", train, len(questions))):
        if found < wanted:
            raise DataError(
                f"found only {found} different problems for {split}={wanted} ({test} are held out); ask for fewer, or "
                "for more digits, steps, names, items or phrases"
            )
    return {
        "train": [_row(task, problem, "train", index) for index, problem in enumerate(questions.values())],
        "test": [_row(task, problem, "test", index) for index, problem in enumerate(held_out.values())],
    }


@dataclass(frozen=True)
class Problem:
    """A question, and its numbers: the first one, then operation and number of every step."""

    question: str
    first: int
    steps: tuple[tuple[Operation, int], ...]

    @property
    def numbers(self) -> tuple[int, tuple[tuple[Operation, int], ...]]:
        """The numbers of the problem."""
        return self.first, self.steps


def _draws(task: ArithmeticTask, seed: str, wanted: int) -> Iterator[Problem]:
    """Random problems, a bounded number of them."""
    rng = random.Random(f"arithmetic {seed}")
    for _ in range(TRIES * wanted + 1000):
        yield _draw(task, rng)


def _draw(task: ArithmeticTask, rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES[: task.names]), rng.choice(ITEMS[: task.items])
    largest = 10**task.digits - 1
    first = value = rng.randint(1, largest)
    steps: list[tuple[Operation, int]] = []
    sentences = [f"{name} has {_number(task, value)} {item}."]
    for _ in range(task.steps):
        operation: Operation = rng.choice([sign for sign in task.operations if sign != "-" or value > 0] or ["+"])
        if operation == "*":
            number = rng.randint(2, 9)
        else:
            number = rng.randint(1, min(value, largest) if operation == "-" else largest)
        phrase = rng.choice(PHRASES[operation][: task.phrases])
        sentences.append(phrase.format(name=name, number=_operand(task, operation, number)))
        steps.append((operation, number))
        value = _apply(value, operation, number)
    sentences.append(f"How many {item} does {name} have now?")
    return Problem(" ".join(sentences), first, tuple(steps))


def _row(task: ArithmeticTask, problem: Problem, split: str, index: int) -> Row:
    value = problem.first
    left = _number(task, value)
    lines = []
    for operation, number in problem.steps:
        right = _operand(task, operation, number)
        if task.columns:
            lines.append(" ".join(_columns(value, operation, number, max(len(left), len(right)))))
        value = _apply(value, operation, number)
        # a sum, or a product with one digit, is at most one digit longer
        result = _number(task, value, task.digits + task.steps)
        equation = f"{left}{operation}{right}="
        lines.append(f"{equation}<<{equation}{result}>>{result}" if task.annotate else f"{equation}{result}")
        left = result
    solution = "\n".join([*lines, f"#### {left}"])
    return prompt_row(problem.question, str(value), "arithmetic", response=solution, split=split, index=index)


def _number(task: ArithmeticTask, value: int, width: int | None = None) -> str:
    return f"{value:0{width or task.digits}d}" if task.pad else str(value)


def _operand(task: ArithmeticTask, operation: Operation, number: int) -> str:
    return str(number) if operation == "*" else _number(task, number)


def _columns(first: int, operation: Operation, second: int, length: int) -> Iterator[str]:
    """Written arithmetic from the last digit to the first: digit, digit, carry (or borrow), and their result."""
    carry = 0
    for place in range(length):
        upper, lower = first // 10**place % 10, second // 10**place % 10
        if operation == "+":
            total = upper + lower + carry
            yield f"{upper}+{lower}+{carry}={total:02d}"
            carry = total // 10
        elif operation == "*":
            total = upper * second + carry
            yield f"{upper}*{second}+{carry}={total:02d}"
            carry = total // 10
        else:
            borrowed = int(upper < lower + carry)
            total = 10 * borrowed + upper
            yield f"{total:02d}-{lower}-{carry}={total - lower - carry}"
            carry = borrowed


def _apply(value: int, operation: Operation, number: int) -> int:
    return value + number if operation == "+" else value - number if operation == "-" else value * number
