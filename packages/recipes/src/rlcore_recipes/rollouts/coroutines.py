"""Coroutines that wait for worker processes.

They wait for nothing else, so they need no event loop: the thread that executes their calls resumes them, in the order
that it chooses. That keeps runs reproducible, and the ranks of ``torchrun`` in step.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Answer(Generic[T]):
    """The awaitable answer to a call."""

    def __init__(self) -> None:
        self._value: list[T] = []  # empty until the answer is there

    def give(self, value: T) -> None:
        """Set the answer."""
        self._value.append(value)

    def __await__(self) -> Generator[Answer[Any], None, T]:
        if not self._value:
            yield self
        return self._value[0]


class Coroutines:
    """Coroutines that are suspended while they await an `Answer`."""

    def __init__(self) -> None:
        self._waiting: dict[Answer[Any], Coroutine[Answer[Any], None, None]] = {}

    @property
    def waiting(self) -> int:
        """Number of suspended coroutines."""
        return len(self._waiting)

    def start(self, coroutine: Coroutine[Any, None, None]) -> None:
        """Run ``coroutine`` until it awaits an answer that is not there yet."""
        with suppress(StopIteration):  # it has ended
            self._waiting[coroutine.send(None)] = coroutine

    def answer(self, answer: Answer[T], value: T) -> None:
        """Give ``answer`` its value; resume the coroutine that awaits it."""
        answer.give(value)
        if answer in self._waiting:
            self.start(self._waiting.pop(answer))
