"""Data sets of tokenised samples, which training tasks without rollouts learn from: reading, counting, batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlcore.batch import Batch
from rlcore.errors import DataError
from rlcore_recipes.data.columns import Row
from rlcore_recipes.data.files import DataFile, Fingerprint, open_files
from rlcore_recipes.data.layouts import Choose
from rlcore_recipes.data.left_out import LeftOut
from rlcore_recipes.data.sample_store import SampleStore

T = TypeVar("T")

MakeSamples = Callable[[DataFile, list[Row], list[str]], Iterable[T]]
"""Returns the samples of rows of a file, without those that are left out; the last argument says where each stands."""


@dataclass(frozen=True)
class SampleDataset(ABC, Generic[T]):
    """Samples of one or several files, in order.

    Attributes:
        samples: what `take` makes rows of.
        file_sizes: samples per file, without the filtered ones.
        filtered: over-long samples left out.
        fingerprints: of what each file holds, in the columns that are read.
        ends: tokens that end an answer (see `written_ends`).
        notes: what was recognised in the files, and what was left out for other reasons, for the user.
        first_filtered: file and row of the first sample that was left out as over-long; empty if unknown.
    """

    samples: Sequence[T]
    file_sizes: list[int]
    filtered: int = 0
    fingerprints: Sequence[str] = ()
    ends: frozenset[int] = frozenset()
    notes: Sequence[str] = ()
    first_filtered: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    def sources(self) -> list[str]:
        """Return the data source of each sample, which is its attribute ``source``."""
        return [sample.source for sample in self.samples]  # type: ignore[attr-defined]

    @abstractmethod
    def take(self, indices: Iterable[int]) -> Batch:
        """Return samples as a batch, each as one row or as several, with ``tokens`` and ``loss_mask``."""


@dataclass(frozen=True)
class ReadSamples(Generic[T]):
    """The samples of files, with the fields of `SampleDataset` that reading them gives.

    Attributes:
        left_out: rows of which ``make`` made no sample.
    """

    samples: SampleStore[T]
    file_sizes: list[int]
    left_out: int
    fingerprints: list[str]
    notes: list[str]


def read_samples(
    files: Sequence[str],
    columns: Choose,
    limit: int | None,
    max_length: int,
    make: MakeSamples[T],
    without: LeftOut | None = None,
) -> ReadSamples[T]:
    """Read ``files`` and ``make`` samples of their rows.

    Args:
        limit: read only the first rows of all files together.
        max_length: the limit of samples in tokens, for the message if none of a file is left.
        without: where ``make`` counts rows that it leaves out for other reasons than their length.

    Raises:
        DataError: a file cannot be read, lacks a column, or has no sample.
    """
    read: ReadSamples[T] = ReadSamples(SampleStore(), [], 0, [], [])
    left_out = 0
    for file in open_files(files, columns, limit):
        fingerprint = Fingerprint(file.name)
        rows_read, before = 0, len(read.samples)
        for rows in file.chunks:
            fingerprint.add(rows)
            places = [f"{file.name}, row {number}" for number in range(rows_read, rows_read + len(rows))]
            read.samples.extend(make(file, rows, places))
            rows_read += len(rows)
        used = len(read.samples) - before
        if not used:
            if without is not None and (notes := without.notes("rows")):
                raise DataError(f"none of the {rows_read} samples of {file.name} can be used: {'; '.join(notes)}")
            raise DataError(
                f"none of the {rows_read} samples of {file.name} fits data.max_length={max_length}; raise it"
            )
        left_out += rows_read - used
        read.file_sizes.append(used)
        read.fingerprints.append(fingerprint.hex())
        read.notes.extend(f"{file.name}: {note}" for note in file.columns.notes)
    return ReadSamples(read.samples, read.file_sizes, left_out, read.fingerprints, read.notes)
