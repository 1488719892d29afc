"""Results that may still be on their way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """A result that somebody is working on."""

    @property
    def done(self) -> bool:
        """Whether `result` would return (or raise) at once."""
        ...

    def result(self) -> T_co:
        """The result; waits for it.

        Raises:
            WorkerError: whoever worked on it failed, or did not answer in time.
        """
        ...


@dataclass(frozen=True)
class Done(Generic[T]):
    """A result that is there already."""

    value: T

    @property
    def done(self) -> bool:
        return True

    def result(self) -> T:
        return self.value
