"""Samples of a data set, in memory or in a temporary file."""

from __future__ import annotations

import os
import pickle
import tempfile
import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from typing import TypeVar, overload

from rlcore.boundary import boundary

T = TypeVar("T")

MEMORY_BYTES = 256 << 20
"""Bytes of samples that are kept in memory; more are written to a temporary file."""


class LazySamples(Sequence[T], ABC):
    """A sequence of samples, each made when it is used."""

    @abstractmethod
    def _sample(self, number: int) -> T:
        """Return the sample of this number, which is in range."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._sample(number) for number in range(*index.indices(len(self)))]
        return self._sample(range(len(self))[index])  # from the end, or out of range, as in a list


class SampleStore(LazySamples[T]):
    """Samples that are written once and read in any order.

    They are kept as bytes. Those of a large data set are in a file without a name in the folder for temporary files
    (``TMPDIR``), which no other user can open and which ends with this process; a sample then takes 8 bytes of memory.
    """

    def __init__(self) -> None:
        self._memory = bytearray()
        self._file: int | None = None
        self._ends = array("Q", [0])

    def extend(self, samples: Iterable[T]) -> None:
        """Append ``samples``.

        Raises:
            DataError: they cannot be written to a temporary file.
        """
        written = bytearray()
        for sample in samples:
            content = pickle.dumps(sample, pickle.HIGHEST_PROTOCOL)
            self._ends.append(self._ends[-1] + len(content))
            written += content
        self._memory += written
        if len(self._memory) > MEMORY_BYTES or self._file is not None:
            self._move_to_file()

    def _move_to_file(self) -> None:
        with boundary(f"samples cannot be written to the folder for temporary files, {tempfile.gettempdir()} (TMPDIR)"):
            if self._file is None:
                with tempfile.TemporaryFile() as file:
                    self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
            left = memoryview(self._memory)
            while left:
                left = left[os.write(self._file, left) :]
        self._memory = bytearray()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _sample(self, number: int) -> T:
        start, end = self._ends[number : number + 2]
        # pread: a process that was forked has the same position in the file
        content = self._memory[start:end] if self._file is None else os.pread(self._file, end - start, start)
        return pickle.loads(content)  # type: ignore[no-any-return]
