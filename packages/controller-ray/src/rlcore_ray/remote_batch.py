"""`RemoteBatch`: a batch by reference, whose token and object columns stay in the processes that made them.

The controller holds the dense columns (scores, groups, lengths: a few numbers per sample) and, for every other column,
references to the rows of chunks in Ray's object store. Selecting, taking and joining samples only rearranges row
numbers. A worker that needs the tokens fetches the rows (`materialize`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from rlcore.batch import Batch, Jagged, balanced_partitions
from rlcore.batch.indexing import check_split, kept_samples, sample_indices, unit_ids
from rlcore.errors import BatchError, WorkerError

FETCH_S = 3600.0
"""Default timeout of waiting for samples that are still being computed."""

Ref = ray.ObjectRef[Any]
Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class ChunkRef:
    """``size`` samples in the object store: the batch ``slot`` of the batches behind ``ref``."""

    ref: Ref
    slot: int
    size: int


@dataclass(frozen=True)
class ColumnRef:
    """The samples of some columns: ``rows`` counts through all ``chunks``.

    Without rows there is still one chunk, which has the columns' kinds and dtypes.
    """

    chunks: tuple[ChunkRef, ...]
    rows: Rows

    def take(self, indices: Rows) -> ColumnRef:
        """Return the samples at ``indices``, with only the chunks that hold them."""
        owner, rows = self._owners(self.rows[indices])
        if not len(rows):
            return ColumnRef(self.chunks[:1], rows)
        used, position = np.unique(owner, return_inverse=True)
        chunks = tuple(self.chunks[number] for number in used)
        starts = np.cumsum([0, *(chunk.size for chunk in chunks[:-1])])  # shift allowed: rows of chunks
        return ColumnRef(chunks, rows + starts[position])

    def runs(self) -> list[tuple[int, int, int]]:
        """Return runs of consecutive samples in a chunk: number of the chunk, first row in it, end (exclusive)."""
        owner, rows = self._owners(self.rows)
        if not len(rows):
            return []
        starts = np.flatnonzero(np.r_[True, (np.diff(owner) != 0) | (np.diff(rows) != 1)])
        ends = rows[np.r_[starts[1:], len(rows)] - 1] + 1  # shift allowed: ends of runs of rows
        return list(zip(owner[starts].tolist(), rows[starts].tolist(), ends.tolist()))

    @staticmethod
    def concat(sources: Sequence[ColumnRef]) -> ColumnRef:
        """Return the samples of all ``sources`` in order."""
        sources = [source for source in sources if len(source.rows)] or sources[:1]
        # shift allowed: rows of sources
        starts = np.cumsum([0, *(sum(chunk.size for chunk in source.chunks) for source in sources[:-1])])
        rows = np.concatenate([source.rows + start for source, start in zip(sources, starts)])
        return ColumnRef(tuple(chunk for source in sources for chunk in source.chunks), rows)

    def _owners(self, rows: Rows) -> tuple[Rows, Rows]:
        """Return the number of the chunk of each of ``rows``, and the row within the chunk."""
        ends = np.cumsum([chunk.size for chunk in self.chunks])
        owner = np.searchsorted(ends, rows, side="right")
        return owner, rows - np.concatenate([[0], ends])[owner]


@dataclass(frozen=True)
class RemoteColumn:
    """A column in the object store.

    Attributes:
        name: of the column in the stored batches.
        lengths: ``[B]`` int64 tokens per sample; None of a column of objects.
    """

    source: ColumnRef
    name: str
    lengths: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.source.rows)


class RemoteBatch:
    """The operations of a `Batch` that need no tokens; see `Batch` for each of them.

    Dtypes of columns in the object store are compared when they are read.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor | RemoteColumn], pending: RemoteColumn | None = None) -> None:
        """Make a batch of ``columns``.

        Args:
            pending: further per-token columns, which are still being computed and whose names are not known: any name
                is looked up there.

        Raises:
            BatchError: columns of different sizes or lengths.
        """
        self._columns = dict(columns)
        self._pending = pending
        every = [*self._columns.items(), *([("pending columns", pending)] if pending is not None else [])]
        self._size = len(every[0][1]) if every else 0
        self._lengths: torch.Tensor | None = None
        for name, column in every:
            if len(column) != self._size:
                raise BatchError(f"column {name!r} has {len(column)} samples, the batch has {self._size}")
            lengths = column.lengths if isinstance(column, RemoteColumn) else None
            if self._lengths is None:
                self._lengths = lengths
            elif lengths is not None and lengths is not self._lengths and not torch.equal(lengths, self._lengths):
                raise BatchError(f"column {name!r} has other lengths than the batch's per-token columns before it")

    # --- reading -------------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> torch.Tensor:
        """``[B]`` int64: tokens per sample."""
        if self._lengths is None:
            raise BatchError(f"the batch has no per-token column: it has {self._listing()}")
        return self._lengths

    @property
    def total_tokens(self) -> int:
        """Number of tokens of all samples."""
        return int(self.lengths.sum())

    @property
    def names(self) -> tuple[str, ...]:
        """All columns whose names are known."""
        return tuple(self._columns)

    @property
    def jagged_names(self) -> tuple[str, ...]:
        """The per-token columns."""
        return tuple(name for name, column in self._remote.items() if column.lengths is not None)

    @property
    def object_names(self) -> tuple[str, ...]:
        """The columns of plain values."""
        return tuple(name for name, column in self._remote.items() if column.lengths is None)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Any:
        """Return a dense column, or the `RemoteColumn` of another one, for `with_columns` (`fetch` reads them)."""
        if name in self._columns:
            return self._columns[name]
        if self._pending is not None:
            return RemoteColumn(self._pending.source, name, self._pending.lengths)
        raise BatchError(f"no column {name!r}; the batch has {self._listing()}")

    def __repr__(self) -> str:
        tokens = "" if self._lengths is None else f", {self.total_tokens} tokens"
        return f"RemoteBatch: {len(self)} samples{tokens}; {self._listing()}"

    @property
    def _remote(self) -> dict[str, RemoteColumn]:
        return {name: column for name, column in self._columns.items() if isinstance(column, RemoteColumn)}

    def _listing(self) -> str:
        return ", ".join(self._columns) or "no columns"

    # --- columns -------------------------------------------------------------------------------------------------

    def select(self, *names: str) -> RemoteBatch:
        """Return the columns ``names``."""
        return RemoteBatch({name: self[name] for name in names})

    def drop(self, *names: str) -> RemoteBatch:
        """Return all columns but ``names``."""
        for name in names:
            self[name]
        return self.select(*(name for name in self.names if name not in names))

    def with_columns(self, **columns: Any) -> RemoteBatch:
        """Add or replace columns: dense tensors ``[B, ...]``, or columns of a `RemoteBatch` of the same samples.

        Raises:
            BatchError: another kind of column, or of another number of samples.
        """
        for name, column in columns.items():
            if not isinstance(column, torch.Tensor | RemoteColumn):
                raise BatchError(
                    f"column {name!r} is a {type(column).__name__}; a batch by reference takes dense columns only"
                )
            if isinstance(column, torch.Tensor) and column.dim() == 0:
                raise BatchError(f"column {name!r} is a scalar: a dense column has one row per sample")
        return RemoteBatch({**self._columns, **columns}, self._pending)

    # --- samples -------------------------------------------------------------------------------------------------

    def take(self, indices: torch.Tensor | Sequence[int]) -> RemoteBatch:
        """Return the samples at ``indices`` (negative ones count from the end), in that order, repeats allowed."""
        index = sample_indices(indices, self._size)
        lengths = None if self._lengths is None else self._lengths[index]
        moved = dict[int, ColumnRef]()

        def move(column: RemoteColumn) -> RemoteColumn:
            source = column.source
            if id(source) not in moved:
                moved[id(source)] = source.take(index.numpy())
            return RemoteColumn(moved[id(source)], column.name, None if column.lengths is None else lengths)

        return RemoteBatch(
            {
                n: move(column) if isinstance(column, RemoteColumn) else column[index]
                for n, column in self._columns.items()
            },
            None if self._pending is None else move(self._pending),
        )

    def filter(self, mask: torch.Tensor | Sequence[bool]) -> RemoteBatch:
        """Return the samples where ``mask`` (one bool per sample) is true."""
        return self.take(kept_samples(mask, self._size))

    def slice(self, start: int, stop: int) -> RemoteBatch:
        """Return samples ``start`` to ``stop`` (exclusive)."""
        return self.take(range(self._size)[start:stop])

    def split(self, size: int, together: str | None = None) -> list[RemoteBatch]:
        """Return consecutive batches of ``size`` samples; the last may be smaller. See `Batch.split`."""
        if size < 1:
            raise BatchError(f"cannot split into batches of {size} samples")
        if together is not None:
            check_split(unit_ids(together, self[together]), size, together)
        return [self.slice(start, start + size) for start in range(0, self._size, size)]

    def partition(self, parts: int, together: str | None = None) -> list[list[int]]:
        """Return indices for ``parts`` ranks, balanced by token count; see `Batch.partition`."""
        lengths = [0] * self._size if self._lengths is None else self._lengths.tolist()
        return balanced_partitions(lengths, parts, None if together is None else unit_ids(together, self[together]))

    @staticmethod
    def concat(batches: Sequence[RemoteBatch]) -> RemoteBatch:
        """Join the samples of all batches in order; all need the same columns. Batches without columns are skipped."""
        batches = [batch for batch in batches if batch._columns or batch._pending is not None]
        if len(batches) < 2:
            return batches[0] if batches else RemoteBatch({})
        first = batches[0]
        for position, batch in enumerate(batches):
            odd = sorted(batch._columns.keys() ^ first._columns.keys())
            if (batch._pending is None) != (first._pending is None):
                odd.append("pending columns")
            if odd:
                raise BatchError(f"batch {position} differs from batch 0 in columns {', '.join(odd)}")
        lengths = None if first._lengths is None else torch.cat([batch.lengths for batch in batches])
        joined = dict[tuple[int, ...], ColumnRef]()

        def join(name: str, columns: Sequence[Any]) -> torch.Tensor | RemoteColumn:
            for position, column in enumerate(columns):
                if _layout(column) != _layout(columns[0]):
                    raise BatchError(
                        f"column {name!r} is {_layout(column)} in batch {position} but {_layout(columns[0])} in batch 0"
                    )
            if isinstance(columns[0], torch.Tensor):
                return torch.cat(list(columns))
            if len({column.name for column in columns}) > 1:
                raise BatchError(f"column {name!r} is stored under different names: {columns[0].name} and others")
            key = tuple(id(column.source) for column in columns)
            if key not in joined:
                joined[key] = ColumnRef.concat([column.source for column in columns])
            return RemoteColumn(joined[key], columns[0].name, None if columns[0].lengths is None else lengths)

        pending = None
        if first._pending is not None:
            made = [batch._pending for batch in batches if batch._pending is not None]
            pending = RemoteColumn(ColumnRef.concat([column.source for column in made]), "", lengths)
        return RemoteBatch({name: join(name, [batch[name] for batch in batches]) for name in first.names}, pending)

    @staticmethod
    def pending(refs: Sequence[Ref], parts: Sequence[Sequence[int]], lengths: torch.Tensor) -> RemoteBatch:
        """Return per-token columns, whose names are not known yet, that workers will put behind ``refs``.

        Args:
            parts: indices of the samples behind each of ``refs``.
            lengths: ``[B]`` int64: tokens of every sample.
        """
        chunks_of_all = [ChunkRef(ref, 0, len(part)) for ref, part in zip(refs, parts)]
        chunks = tuple(chunk for chunk in chunks_of_all if chunk.size) or tuple(chunks_of_all[:1])
        origin = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
        return RemoteBatch({}, RemoteColumn(ColumnRef(chunks, np.argsort(origin)), "", lengths))

    # --- tokens --------------------------------------------------------------------------------------------------

    def fetch(self) -> Batch:
        """Read all columns out of the object store."""
        return materialize(self)


@dataclass(frozen=True)
class BatchMeta:
    """The part of a stored batch that the controller holds.

    Attributes:
        columns: dense columns; None in the place of the others.
        lengths: ``[B]`` int64 of the columns in ``jagged``; None if there are none.
    """

    size: int
    columns: dict[str, torch.Tensor | None]
    jagged: tuple[str, ...]
    lengths: torch.Tensor | None

    def at(self, source: ColumnRef) -> RemoteBatch:
        """Return the batch whose other columns are at ``source``."""

        def remote(name: str) -> RemoteColumn:
            return RemoteColumn(source, name, self.lengths if name in self.jagged else None)

        return RemoteBatch({name: remote(name) if c is None else c for name, c in self.columns.items()})


def metadata(batch: Batch) -> BatchMeta:
    """Return what the controller holds of ``batch``; `bulk` is the rest."""
    columns = {
        # a copy, since torch pickles the complete storage of a view
        name: batch[name].detach().cpu().clone() if isinstance(batch[name], torch.Tensor) else None
        for name in batch.names
    }
    lengths = batch.lengths.clone() if batch.jagged_names else None
    return BatchMeta(len(batch), columns, batch.jagged_names, lengths)


def bulk(batch: Batch) -> Batch:
    """Return the columns of ``batch`` that stay in the object store."""
    return batch.select(*(name for name in batch.names if not isinstance(batch[name], torch.Tensor))).to("cpu")


def materialize(batch: RemoteBatch, timeout_s: float = FETCH_S) -> Batch:
    """Read the columns of ``batch``. A single run of one chunk is not copied; anything else is copied once.

    Args:
        timeout_s: timeout of waiting for chunks that are still being computed.

    Raises:
        ray.exceptions.RayError: a chunk is lost.
        WorkerError: a chunk was not computed in time.
        BatchError: the call that should have computed a chunk failed.
    """
    remote = batch._remote
    refs = list({chunk.ref: None for column in remote.values() for chunk in column.source.chunks})
    try:
        values = ray.get(refs, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        late = f"{', '.join(remote)} of {len(batch)} samples were not computed within {timeout_s:g} s"
        raise WorkerError(late) from None
    stored: dict[Ref, tuple[Batch, ...] | None] = dict(zip(refs, values))
    for column in remote.values():
        for chunk in column.source.chunks:
            _check(stored[chunk.ref], chunk)
    by_source: dict[int, list[tuple[str, RemoteColumn]]] = {}
    for name, column in remote.items():
        by_source.setdefault(id(column.source), []).append((name, column))
    found: dict[str, Any] = {name: batch[name] for name in batch.names if name not in remote}
    for columns in by_source.values():
        source = columns[0][1].source
        names = tuple(dict.fromkeys(column.name for _, column in columns))
        chunks = [stored[chunk.ref][chunk.slot].select(*names) for chunk in source.chunks]  # type: ignore[index]
        read = _read(chunks, source.runs(), names)
        found |= {name: read[column.name] for name, column in columns}
    return Batch({name: found[name] for name in batch.names})


def _read(chunks: Sequence[Batch], runs: Sequence[tuple[int, int, int]], names: Sequence[str]) -> dict[str, Any]:
    """Read the columns ``names`` over ``runs`` (see `ColumnRef.runs`) of ``chunks``."""
    runs = runs or [(0, 0, 0)]
    first = chunks[0]
    columns: dict[str, Any] = {}
    if first.jagged_names:
        lengths = _joined([chunks[number].lengths[start:end] for number, start, end in runs])
        offsets = [chunk[chunk.jagged_names[0]].offsets.tolist() for chunk in chunks]
        spans = [(number, offsets[number][start], offsets[number][end]) for number, start, end in runs]
        for name in first.jagged_names:
            values = [chunk.flat(name) for chunk in chunks]
            if len({(column.dtype, column.shape[1:]) for column in values}) > 1:
                kinds = sorted({f"{column.dtype} {list(column.shape[1:])}" for column in values})
                raise BatchError(f"workers returned column {name!r} as {' and as '.join(kinds)}")
            columns[name] = Jagged(_joined([values[number][start:end] for number, start, end in spans]), lengths)
    for name in first.object_names:
        columns[name] = [value for number, start, end in runs for value in chunks[number][name][start:end]]
    return {name: columns[name] for name in names}


def _check(body: tuple[Batch, ...] | None, chunk: ChunkRef) -> None:
    if body is None:
        raise BatchError("the samples do not exist: the call that should have returned them failed")
    if body[chunk.slot].names and len(body[chunk.slot]) != chunk.size:
        raise BatchError(f"a worker returned {len(body[chunk.slot])} entries for {chunk.size} samples")


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _layout(column: torch.Tensor | RemoteColumn) -> str:
    """Return in words what columns must have in common to be concatenated."""
    if isinstance(column, torch.Tensor):
        return f"dense {column.dtype} [B, {', '.join(map(str, column.shape[1:]))}]".replace(", ]", "]")
    return "objects" if column.lengths is None else "jagged"
