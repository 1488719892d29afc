"""`RemoteBatch`: a batch whose token and object columns stay where they were made.

The controller holds the dense columns (scores, groups, lengths: a few numbers per sample) and, for every other column,
which rows of which pieces in Ray's object store it consists of. Selecting, taking and joining samples only moves row
numbers about. Whoever works on the tokens fetches the rows it needs (`materialize`).
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
"""Longest wait for samples that are being made, unless the caller says otherwise."""

Ref = ray.ObjectRef[Any]
Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Piece:
    """Samples in the object store: number ``slot`` of the batches behind ``ref``."""

    ref: Ref
    slot: int
    size: int


@dataclass(frozen=True)
class Source:
    """Where the samples of some columns are: ``rows`` counts through all ``pieces``.

    Without rows there is one piece still, which knows the columns' kinds and dtypes.
    """

    pieces: tuple[Piece, ...]
    rows: Rows

    def take(self, indices: Rows) -> Source:
        """The samples at ``indices``, and only the pieces that they stand in."""
        owner, rows = self._owners(self.rows[indices])
        if not len(rows):
            return Source(self.pieces[:1], rows)
        used, place = np.unique(owner, return_inverse=True)
        pieces = tuple(self.pieces[number] for number in used)
        starts = np.cumsum([0, *(piece.size for piece in pieces[:-1])])  # shift allowed: rows of pieces
        return Source(pieces, rows + starts[place])

    def runs(self) -> list[tuple[int, int, int]]:
        """Stretches of samples that follow each other in a piece: its number, the first row in it, the end."""
        owner, rows = self._owners(self.rows)
        if not len(rows):
            return []
        starts = np.flatnonzero(np.r_[True, (np.diff(owner) != 0) | (np.diff(rows) != 1)])
        ends = rows[np.r_[starts[1:], len(rows)] - 1] + 1  # shift allowed: ends of runs of rows
        return list(zip(owner[starts].tolist(), rows[starts].tolist(), ends.tolist()))

    @staticmethod
    def concat(sources: Sequence[Source]) -> Source:
        sources = [source for source in sources if len(source.rows)] or sources[:1]
        # shift allowed: rows of sources
        starts = np.cumsum([0, *(sum(piece.size for piece in source.pieces) for source in sources[:-1])])
        rows = np.concatenate([source.rows + start for source, start in zip(sources, starts)])
        return Source(tuple(piece for source in sources for piece in source.pieces), rows)

    def _owners(self, rows: Rows) -> tuple[Rows, Rows]:
        """In which piece each row stands, and where in it."""
        ends = np.cumsum([piece.size for piece in self.pieces])
        owner = np.searchsorted(ends, rows, side="right")
        return owner, rows - np.concatenate([[0], ends])[owner]


@dataclass(frozen=True)
class RemoteColumn:
    """A column that is elsewhere.

    Attributes:
        name: what it is called there.
        lengths: ``[B]`` int64 tokens per sample; None of a column of objects.
    """

    source: Source
    name: str
    lengths: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.source.rows)


class RemoteBatch:
    """What a controller does with a `Batch`, without its tokens; see `Batch` for the operations.

    dtypes of columns that are elsewhere are compared by whoever reads them.
    """

    def __init__(
        self, columns: Mapping[str, torch.Tensor | RemoteColumn], being_made: RemoteColumn | None = None
    ) -> None:
        """
        Args:
            being_made: stands for further per-token columns, whose names are not known yet: any name is looked for
                there.

        Raises:
            BatchError: columns of different sizes or lengths.
        """
        self._columns = dict(columns)
        self._being_made = being_made
        every = [*self._columns.items(), *([("columns being made", being_made)] if being_made is not None else [])]
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
        return int(self.lengths.sum())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._columns)

    @property
    def jagged_names(self) -> tuple[str, ...]:
        return tuple(name for name, column in self._remote.items() if column.lengths is not None)

    @property
    def object_names(self) -> tuple[str, ...]:
        return tuple(name for name, column in self._remote.items() if column.lengths is None)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Any:
        """A dense column itself; of others the `RemoteColumn`, for `with_columns` (`fetch` reads them)."""
        if name in self._columns:
            return self._columns[name]
        if self._being_made is not None:
            return RemoteColumn(self._being_made.source, name, self._being_made.lengths)
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
        return RemoteBatch({name: self[name] for name in names})

    def drop(self, *names: str) -> RemoteBatch:
        for name in names:
            self[name]
        return self.select(*(name for name in self.names if name not in names))

    def with_columns(self, **columns: Any) -> RemoteBatch:
        """Add or replace columns: dense tensors ``[B, ...]``, or columns of a `RemoteBatch` of the same samples."""
        for name, column in columns.items():
            if not isinstance(column, torch.Tensor | RemoteColumn):
                raise BatchError(f"column {name!r} is a {type(column).__name__}; only dense ones are added from here")
            if isinstance(column, torch.Tensor) and column.dim() == 0:
                raise BatchError(f"column {name!r} is a scalar: a dense column has one row per sample")
        return RemoteBatch({**self._columns, **columns}, self._being_made)

    # --- samples -------------------------------------------------------------------------------------------------

    def take(self, indices: torch.Tensor | Sequence[int]) -> RemoteBatch:
        """The samples at ``indices`` (negative ones count from the end), in that order, repeats allowed."""
        index = sample_indices(indices, self._size)
        lengths = None if self._lengths is None else self._lengths[index]
        moved = dict[int, Source]()

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
            None if self._being_made is None else move(self._being_made),
        )

    def filter(self, mask: torch.Tensor | Sequence[bool]) -> RemoteBatch:
        return self.take(kept_samples(mask, self._size))

    def slice(self, start: int, stop: int) -> RemoteBatch:
        return self.take(range(self._size)[start:stop])

    def split(self, size: int, together: str | None = None) -> list[RemoteBatch]:
        if size < 1:
            raise BatchError(f"cannot split into batches of {size} samples")
        if together is not None:
            check_split(unit_ids(together, self[together]), size, together)
        return [self.slice(start, start + size) for start in range(0, self._size, size)]

    def partition(self, parts: int, together: str | None = None) -> list[list[int]]:
        """Indices for ``parts`` ranks, balanced by token count (`balanced_partitions`); see `Batch.partition`."""
        lengths = [0] * self._size if self._lengths is None else self._lengths.tolist()
        return balanced_partitions(lengths, parts, None if together is None else unit_ids(together, self[together]))

    @staticmethod
    def concat(batches: Sequence[RemoteBatch]) -> RemoteBatch:
        """Samples of all batches in order; all need the same columns. Batches without any column are skipped."""
        batches = [batch for batch in batches if batch._columns or batch._being_made is not None]
        if len(batches) < 2:
            return batches[0] if batches else RemoteBatch({})
        first = batches[0]
        for position, batch in enumerate(batches):
            odd = sorted(batch._columns.keys() ^ first._columns.keys())
            if (batch._being_made is None) != (first._being_made is None):
                odd.append("columns that are being made")
            if odd:
                raise BatchError(f"batch {position} differs from batch 0 in columns {', '.join(odd)}")
        lengths = None if first._lengths is None else torch.cat([batch.lengths for batch in batches])
        joined = dict[tuple[int, ...], Source]()

        def join(name: str, columns: Sequence[Any]) -> torch.Tensor | RemoteColumn:
            for position, column in enumerate(columns):
                if _layout(column) != _layout(columns[0]):
                    raise BatchError(
                        f"column {name!r} is {_layout(column)} in batch {position} but {_layout(columns[0])} in batch 0"
                    )
            if isinstance(columns[0], torch.Tensor):
                return torch.cat(list(columns))
            if len({column.name for column in columns}) > 1:
                raise BatchError(f"column {name!r} was made under different names: {columns[0].name} and others")
            key = tuple(id(column.source) for column in columns)
            if key not in joined:
                joined[key] = Source.concat([column.source for column in columns])
            return RemoteColumn(joined[key], columns[0].name, None if columns[0].lengths is None else lengths)

        making = None
        if first._being_made is not None:
            made = [batch._being_made for batch in batches if batch._being_made is not None]
            making = RemoteColumn(Source.concat([column.source for column in made]), "", lengths)
        return RemoteBatch({name: join(name, [batch[name] for batch in batches]) for name in first.names}, making)

    @staticmethod
    def being_made(refs: Sequence[Ref], parts: Sequence[Sequence[int]], lengths: torch.Tensor) -> RemoteBatch:
        """Per-token columns, of whatever names, that workers will put behind ``refs``, each for its part.

        Args:
            lengths: ``[B]`` int64: tokens of every sample.
        """
        made = [Piece(ref, 0, len(part)) for ref, part in zip(refs, parts)]
        pieces = tuple(piece for piece in made if piece.size) or tuple(made[:1])
        origin = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
        return RemoteBatch({}, RemoteColumn(Source(pieces, np.argsort(origin)), "", lengths))

    # --- tokens --------------------------------------------------------------------------------------------------

    def fetch(self) -> Batch:
        """The whole batch, here: reads all columns out of the object store."""
        return materialize(self)


@dataclass(frozen=True)
class Outline:
    """What a controller keeps of a batch that is elsewhere.

    Attributes:
        columns: dense ones themselves; None in the place of others.
        lengths: ``[B]`` int64 of the columns in ``jagged``; None without any.
    """

    size: int
    columns: dict[str, torch.Tensor | None]
    jagged: tuple[str, ...]
    lengths: torch.Tensor | None

    def at(self, source: Source) -> RemoteBatch:
        def remote(name: str) -> RemoteColumn:
            return RemoteColumn(source, name, self.lengths if name in self.jagged else None)

        return RemoteBatch({name: remote(name) if c is None else c for name, c in self.columns.items()})


def outline(batch: Batch) -> Outline:
    """What the controller is told of ``batch``; `bulk` holds the rest."""
    columns = {
        # a copy, since torch pickles all of the storage that a view looks at
        name: batch[name].detach().cpu().clone() if isinstance(batch[name], torch.Tensor) else None
        for name in batch.names
    }
    lengths = batch.lengths.clone() if batch.jagged_names else None
    return Outline(len(batch), columns, batch.jagged_names, lengths)


def bulk(batch: Batch) -> Batch:
    """The columns of ``batch`` that stay in the object store."""
    return batch.select(*(name for name in batch.names if not isinstance(batch[name], torch.Tensor))).to("cpu")


def materialize(batch: RemoteBatch, timeout_s: float = FETCH_S) -> Batch:
    """Read the columns of ``batch``. What stands in one stretch of one piece is not copied; the rest is copied once.

    Args:
        timeout_s: longest wait for pieces that are being made.

    Raises:
        ray.exceptions.RayError: a piece is lost.
        WorkerError: a piece is not made in time.
        BatchError: whoever should have made a piece failed.
    """
    remote = batch._remote
    refs = list({piece.ref: None for column in remote.values() for piece in column.source.pieces})
    try:
        values = ray.get(refs, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        late = f"{', '.join(remote)} of {len(batch)} samples: not made within {timeout_s:g} s by whoever was asked"
        raise WorkerError(late) from None
    stored: dict[Ref, tuple[Batch, ...] | None] = dict(zip(refs, values))
    for column in remote.values():
        for piece in column.source.pieces:
            _check(stored[piece.ref], piece)
    by_source: dict[int, list[tuple[str, RemoteColumn]]] = {}
    for name, column in remote.items():
        by_source.setdefault(id(column.source), []).append((name, column))
    found: dict[str, Any] = {name: batch[name] for name in batch.names if name not in remote}
    for columns in by_source.values():
        source = columns[0][1].source
        names = tuple(dict.fromkeys(column.name for _, column in columns))
        pieces = [stored[piece.ref][piece.slot].select(*names) for piece in source.pieces]  # type: ignore[index]
        read = _read(pieces, source.runs(), names)
        found |= {name: read[column.name] for name, column in columns}
    return Batch({name: found[name] for name in batch.names})


def _read(pieces: Sequence[Batch], runs: Sequence[tuple[int, int, int]], names: Sequence[str]) -> dict[str, Any]:
    """The columns ``names`` over ``runs`` (see `Source.runs`) of ``pieces``."""
    runs = runs or [(0, 0, 0)]
    first = pieces[0]
    columns: dict[str, Any] = {}
    if first.jagged_names:
        lengths = _joined([pieces[number].lengths[start:end] for number, start, end in runs])
        offsets = [piece[piece.jagged_names[0]].offsets.tolist() for piece in pieces]
        spans = [(number, offsets[number][start], offsets[number][end]) for number, start, end in runs]
        for name in first.jagged_names:
            values = [piece.flat(name) for piece in pieces]
            if len({(column.dtype, column.shape[1:]) for column in values}) > 1:
                kinds = sorted({f"{column.dtype} {list(column.shape[1:])}" for column in values})
                raise BatchError(f"column {name!r} was made as {' and as '.join(kinds)}")
            columns[name] = Jagged(_joined([values[number][start:end] for number, start, end in spans]), lengths)
    for name in first.object_names:
        columns[name] = [value for number, start, end in runs for value in pieces[number][name][start:end]]
    return {name: columns[name] for name in names}


def _check(body: tuple[Batch, ...] | None, piece: Piece) -> None:
    if body is None:
        raise BatchError("the samples were never made: whoever should have made them failed")
    if body[piece.slot].names and len(body[piece.slot]) != piece.size:
        raise BatchError(f"a worker returned {len(body[piece.slot])} entries for {piece.size} samples")


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _layout(column: torch.Tensor | RemoteColumn) -> str:
    """What columns must have in common to be concatenated, in words."""
    if isinstance(column, torch.Tensor):
        return f"dense {column.dtype} [B, {', '.join(map(str, column.shape[1:]))}]".replace(", ]", "]")
    return "objects" if column.lengths is None else "jagged"
