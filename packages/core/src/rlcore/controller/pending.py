"""`Pending`: results of calls that may not be finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """The result of a call that a worker may still be working on."""

    @property
    def done(self) -> bool:
        """Whether `result` would return (or raise) without waiting."""
        ...

    def result(self) -> T_co:
        """Wait for the result and return it.

        Raises:
            WorkerError: the call failed in the worker, or the worker did not answer in time.
        """
        ...


@dataclass(frozen=True)
class Done(Generic[T]):
    """A result that is available already."""

    value: T

    @property
    def done(self) -> bool:
        return True

    def result(self) -> T:
        return self.value
