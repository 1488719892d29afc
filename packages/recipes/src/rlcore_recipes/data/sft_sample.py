"""One supervised sample, and files of them that are read memory-mapped."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlcore.boundary import boundary
from rlcore_recipes.data.sample_store import LazySamples

T = TypeVar("T")

BATCH_TOKENS = 1 << 22
"""Tokens of a record batch, about."""


@dataclass(frozen=True)
class SFTSample:
    """One sample: ``mask`` is 1 on tokens that are learned."""

    tokens: array[int]
    mask: bytes
    source: str


def write_samples(samples: Iterable[SFTSample], path: Path) -> None:
    """Write samples as an Arrow stream with the columns ``input_ids``, ``loss_mask`` and ``data_source``."""
    import pyarrow as pa

    columns = {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.uint8()), "data_source": pa.string()}
    schema = pa.schema(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for rows in _batches(samples):
            ends = np.fromiter(accumulate((len(row.tokens) for row in rows), initial=0), np.int32, len(rows) + 1)
            offsets = pa.array(ends)
            tokens = np.concatenate([np.frombuffer(row.tokens, np.int32) for row in rows])
            masks = np.frombuffer(b"".join(row.mask for row in rows), np.uint8)
            lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (tokens, masks)]
            writer.write_batch(pa.record_batch([*lists, pa.array([row.source for row in rows])], schema))


def _batches(samples: Iterable[SFTSample]) -> Iterator[list[SFTSample]]:
    rows: list[SFTSample] = []
    tokens = 0
    for sample in samples:
        rows.append(sample)
        tokens += len(sample.tokens)
        if tokens >= BATCH_TOKENS:
            yield rows
            rows, tokens = [], 0
    if rows:
        yield rows


class MappedSamples(LazySamples[SFTSample]):
    """The samples of a file that `write_samples` wrote; they stay on disk until they are used.

    Args:
        limit: samples to use; None uses all.

    Raises:
        DataError: the file is damaged.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        import pyarrow as pa

        with boundary(f"{path} is damaged; tokenise the data again"):
            stream = pa.ipc.open_stream(pa.memory_map(str(path)))
            self._batches: list[tuple[Any, ...]] = []
            for batch in stream:
                tokens, masks, sources = batch.columns
                views = [column.values.to_numpy() for column in (tokens, masks)]
                self._batches.append((tokens.offsets.to_numpy(), *views, sources))
        self._ends = list(accumulate(len(sources) for *_, sources in self._batches))
        count = self._ends[-1] if self._ends else 0
        self._count = count if limit is None else min(limit, count)

    def __len__(self) -> int:
        return self._count

    def _sample(self, number: int) -> SFTSample:
        batch = bisect_right(self._ends, number)
        offsets, tokens, masks, sources = self._batches[batch]
        place = number - (self._ends[batch] - len(sources))
        part = slice(*offsets[place : place + 2])
        return SFTSample(array("i", tokens[part].tobytes()), masks[part].tobytes(), sources[place].as_py())


class Joined(LazySamples[T]):
    """Several sequences, one after another."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _sample(self, number: int) -> T:
        part = bisect_right(self._ends, number)
        return self._parts[part][number - (self._ends[part] - len(self._parts[part]))]
