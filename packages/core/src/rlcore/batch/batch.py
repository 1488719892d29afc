"""`Batch`: an immutable, columnar, padding-free set of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlcore.batch.balance import balanced_partitions, micro_batches
from rlcore.batch.indexing import check_split, kept_samples, sample_indices, unit_ids
from rlcore.batch.jagged import Column, Jagged
from rlcore.batch.memory import PickledTensor, dtype_name, to_numpy
from rlcore.errors import BatchError

if TYPE_CHECKING:
    import pyarrow as pa


class Batch:
    """Samples in columns.

    A column is *dense* (a ``[B, ...]`` tensor), *jagged* (`Jagged`, per token) or *objects* (a list of plain values).
    All jagged columns of a batch share one ``lengths``: entry *t* of each belongs to ``tokens[t]`` given the tokens
    before it (`rlcore.batch.alignment`). All tensors share one device; ``lengths`` stays on the CPU.

    A batch never changes: operations return new batches that share storage where they can, so what a column holds must
    not be written to either. A pickle holds only the samples of the batch, not the storage behind its views.

    Raises:
        BatchError: columns of different sizes, lengths or devices; the message names the column and both shapes.
    """

    __slots__ = ("_columns", "_first_jagged", "_size")

    def __init__(self, columns: Mapping[str, Column | Sequence[Any]]) -> None:
        self._columns: dict[str, Column] = {}
        self._first_jagged: str | None = None
        self._size = 0
        first: str | None = None
        device: tuple[str, torch.device] | None = None
        for name, given in columns.items():
            column = _as_column(name, given)
            if first is None:
                first, self._size = name, len(column)
            elif len(column) != self._size:
                raise BatchError(
                    f"column {name!r} has {len(column)} samples ({_shape(column)}) but column {first!r} has "
                    f"{self._size} ({_shape(self._columns[first])})"
                )
            if isinstance(column, Jagged):
                column = self._share_lengths(name, column)
            tensor = column.values if isinstance(column, Jagged) else column
            if isinstance(tensor, torch.Tensor):
                if device is None:
                    device = (name, tensor.device)
                elif device[1] != tensor.device:
                    raise BatchError(
                        f"column {name!r} is on {tensor.device} but column {device[0]!r} is on {device[1]}; "
                        "move the batch with .to(device)"
                    )
            self._columns[name] = column

    def _share_lengths(self, name: str, column: Jagged) -> Jagged:
        """Return ``column`` over the ``lengths`` tensor of the first jagged column, which is compared only once."""
        if self._first_jagged is None:
            self._first_jagged = name
            return column
        lengths = self.lengths
        if column.lengths is lengths:
            return column
        if not torch.equal(column.lengths, lengths):
            row = int((column.lengths != lengths).nonzero()[0])
            raise BatchError(
                f"column {name!r} ({_shape(column)}) and column {self._first_jagged!r} "
                f"({_shape(self._columns[self._first_jagged])}) have different lengths, first at sample {row}: "
                f"{int(column.lengths[row])} and {int(lengths[row])}"
            )
        return Jagged(column.values, lengths)

    # --- reading -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._size

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Any:
        """Return the column itself: a tensor, a `Jagged` or a list."""
        try:
            return self._columns[name]
        except KeyError:
            raise BatchError(f"no column {name!r}; the batch has {self._listing()}") from None

    def flat(self, name: str) -> torch.Tensor:
        """Return the values ``[T, ...]`` of a jagged column."""
        column = self[name]
        if not isinstance(column, Jagged):
            raise BatchError(f"column {name!r} ({_shape(column)}) is not per token")
        return column.values

    @property
    def names(self) -> tuple[str, ...]:
        """All columns, in order."""
        return tuple(self._columns)

    @property
    def jagged_names(self) -> tuple[str, ...]:
        """The per-token columns."""
        return tuple(name for name, column in self._columns.items() if isinstance(column, Jagged))

    @property
    def object_names(self) -> tuple[str, ...]:
        """The columns of plain values."""
        return tuple(name for name, column in self._columns.items() if isinstance(column, list))

    @property
    def lengths(self) -> torch.Tensor:
        """``[B]`` int64 on the CPU: tokens per sample."""
        if self._first_jagged is None:
            raise BatchError(f"the batch has no per-token column: it has {self._listing()}")
        return self._sequences().lengths

    @property
    def total_tokens(self) -> int:
        """Number of tokens of all samples."""
        return int(self.lengths.sum())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one dict per sample: ``[...]`` tensors of dense columns, ``[t, ...]`` views of jagged ones, objects."""
        split = {n: c.to_list() if isinstance(c, Jagged) else c for n, c in self._columns.items()}
        for index in range(self._size):
            yield {name: column[index] for name, column in split.items()}

    def equals(self, other: Batch) -> bool:
        """Return whether columns (in any order), kinds, dtypes and values are the same, bit by bit; devices may differ.

        NaN equals NaN.
        """
        return (
            self._columns.keys() == other._columns.keys()
            and len(self) == len(other)
            and all(_equal(column, other._columns[name]) for name, column in self._columns.items())
        )

    def __repr__(self) -> str:
        if not self._columns:
            return "Batch(no columns)"
        size = f"{self._size} sample{'' if self._size == 1 else 's'}"
        if self._first_jagged is not None:
            size += f", {self.total_tokens} tokens"
            if self._size:
                size += f" ({int(self.lengths.min())} to {int(self.lengths.max())} each)"
        width = max(map(len, self._columns))
        lines = [f"  {name:<{width}}  {_shape(column)}" for name, column in self._columns.items()]
        return "\n".join([f"Batch: {size}", *lines])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the shared lengths once, and of every tensor only the samples of this batch (`PickledTensor`)."""
        columns: dict[str, tuple[bool, Any]] = {}
        for name, column in self._columns.items():
            value = column.values if isinstance(column, Jagged) else column
            columns[name] = (
                isinstance(column, Jagged),
                PickledTensor(value) if isinstance(value, torch.Tensor) else value,
            )
        return _unpickle, (columns, PickledTensor(self._sequences().lengths))

    def _sequences(self) -> Jagged:
        """Return a column with the lengths of all jagged columns; without any, sequences of no tokens."""
        if self._first_jagged is None:
            return Jagged(torch.empty(0), torch.zeros(self._size, dtype=torch.int64))
        column = self._columns[self._first_jagged]
        assert isinstance(column, Jagged)
        return column

    def _changed(
        self,
        lengths: torch.Tensor,
        tokens: Callable[[torch.Tensor], torch.Tensor],
        dense: Callable[[torch.Tensor], torch.Tensor],
        objects: Callable[[list[Any]], list[Any]],
    ) -> Batch:
        """Return the same columns over sequences of ``lengths``, each mapped by the function for its kind."""
        columns: dict[str, Column] = {}
        for name, column in self._columns.items():
            if isinstance(column, Jagged):
                columns[name] = Jagged(tokens(column.values), lengths)
            elif isinstance(column, torch.Tensor):
                columns[name] = dense(column)
            else:
                columns[name] = objects(column)
        return Batch(columns)

    def _listing(self) -> str:
        return ", ".join(self._columns) or "no columns"

    # --- columns -------------------------------------------------------------------------------------------------

    def select(self, *names: str) -> Batch:
        """Return the columns ``names``."""
        return Batch({name: self[name] for name in names})

    def drop(self, *names: str) -> Batch:
        """Return all columns but ``names``."""
        for name in names:
            self[name]
        return Batch({name: column for name, column in self._columns.items() if name not in names})

    def rename(self, **names: str) -> Batch:
        """Rename columns, as in ``batch.rename(logprobs="old_logprobs")``; their order stays."""
        for name in names:
            self[name]
        columns: dict[str, Column] = {}
        for name, column in self._columns.items():
            new = names.get(name, name)
            if new in columns:
                raise BatchError(f"column {name!r} cannot be called {new!r}: the batch would have two of that name")
            columns[new] = column
        return Batch(columns)

    def with_columns(self, **columns: Column | Sequence[Any]) -> Batch:
        """Add or replace columns. A tensor is dense; wrap per-token values with `jagged`."""
        return Batch({**self._columns, **columns})

    def jagged(self, values: torch.Tensor) -> Jagged:
        """Return per-token values ``[T, ...]`` as a column of this batch."""
        return Jagged(values, self.lengths)

    def union(self, other: Batch) -> Batch:
        """Return the columns of both batches.

        Raises:
            BatchError: both have a column of the same name.
        """
        clash = [name for name in other.names if name in self._columns]
        if clash:
            raise BatchError(
                f"both batches have column {clash[0]!r} ({_shape(self[clash[0]])} and {_shape(other[clash[0]])}); "
                "drop or rename one before the union"
            )
        return Batch({**self._columns, **other._columns})

    # --- samples -------------------------------------------------------------------------------------------------

    def take(self, indices: torch.Tensor | Sequence[int]) -> Batch:
        """Copy the samples at ``indices`` (negative ones count from the end), in that order, repeats allowed."""
        index = sample_indices(indices, self._size)
        sequences = self._sequences()
        positions, chosen = sequences.positions(index), index.tolist()
        return self._changed(
            sequences.lengths[index],
            tokens=lambda values: values[positions.to(values.device)],
            dense=lambda column: column[index.to(column.device)],
            objects=lambda column: [column[i] for i in chosen],
        )

    def filter(self, mask: torch.Tensor | Sequence[bool]) -> Batch:
        """Return the samples where ``mask`` (one bool per sample) is true."""
        return self.take(kept_samples(mask, self._size))

    def slice(self, start: int, stop: int) -> Batch:
        """Return samples ``start`` to ``stop`` (exclusive, as in Python), as views."""
        start, stop, _ = slice(start, stop).indices(self._size)
        sequences = self._sequences()
        begin, end = int(sequences.offsets[start]), int(sequences.offsets[max(start, stop)])
        return self._changed(
            sequences.lengths[start:stop],
            tokens=lambda values: values[begin:end],
            dense=lambda column: column[start:stop],
            objects=lambda column: column[start:stop],
        )

    def resequenced(self, lengths: torch.Tensor, samples: torch.Tensor | Sequence[int]) -> Batch:
        """Return the same tokens in the same order, divided into other sequences.

        Args:
            lengths: ``[N]`` int64, tokens of each sequence.
            samples: ``[N]``, the sample from which each sequence has its dense columns and objects.
        """
        index = sample_indices(samples, self._size)
        chosen = index.tolist()
        return self._changed(
            lengths,
            tokens=lambda values: values,
            dense=lambda column: column[index.to(column.device)],
            objects=lambda column: [column[i] for i in chosen],
        )

    def split(self, size: int, together: str | None = None) -> list[Batch]:
        """Return consecutive batches of ``size`` samples, as views; the last may be smaller.

        Args:
            together: a column of unit ids (see `partition`); it is an error if a unit would be divided.
        """
        if size < 1:
            raise BatchError(f"cannot split into batches of {size} samples")
        if together is not None:
            check_split(unit_ids(together, self[together]), size, together)
        return [self.slice(start, start + size) for start in range(0, self._size, size)]

    def iterate(self, size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Yield mini-batches of ``size`` samples, shuffled if a ``generator`` is given; the last may be smaller."""
        if generator is None:
            yield from self.split(size)
        else:
            order = torch.randperm(self._size, generator=generator, device=generator.device)
            yield from self.take(order).split(size)

    def partition(self, parts: int, together: str | None = None) -> list[list[int]]:
        """Return indices for ``parts`` ranks, balanced by token count (`balanced_partitions`).

        Args:
            together: a dense column with one integer per sample, such as ``group``: samples with the same number are
                one unit, which is never divided.
        """
        return balanced_partitions(self._sequences().lengths.tolist(), parts, self._units(together))

    def micro_batches(self, max_tokens: int, together: str | None = None) -> list[list[int]]:
        """Return indices of micro-batches of at most ``max_tokens`` tokens (`rlcore.batch.micro_batches`).

        Args:
            together: a column of unit ids (see `partition`); a unit of more tokens is a micro-batch by itself.
        """
        return micro_batches(self._sequences().lengths.tolist(), max_tokens, self._units(together))

    def _units(self, together: str | None) -> list[int] | None:
        return None if together is None else unit_ids(together, self[together])

    def repeat(self, n: int) -> Batch:
        """Repeat each sample ``n`` times in a row: a b → a a b b."""
        if n < 0:
            raise BatchError(f"cannot repeat samples {n} times")
        return self.take(torch.arange(self._size).repeat_interleave(n))

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """Join the samples of all batches in order.

        Batches without any column are skipped.

        Raises:
            BatchError: the batches differ in columns, kinds or dtypes.
        """
        batches = [batch for batch in batches if batch._columns]
        if len(batches) < 2:
            return batches[0] if batches else Batch({})
        for position, batch in enumerate(batches):
            odd = sorted(batch._columns.keys() ^ batches[0]._columns.keys())
            if odd:
                raise BatchError(f"batch {position} differs from batch 0 in columns {', '.join(odd)}")
        columns: dict[str, Column] = {}
        lengths = None
        for name, first in batches[0]._columns.items():
            parts = [batch[name] for batch in batches]
            for position, part in enumerate(parts):
                if _layout(part) != _layout(first):
                    raise BatchError(
                        f"column {name!r} is {_shape(part)} in batch {position} but {_shape(first)} in batch 0"
                    )
            if isinstance(first, Jagged):
                if lengths is None:
                    lengths = torch.cat([batch.lengths for batch in batches])
                columns[name] = Jagged(torch.cat([part.values for part in parts]), lengths)
            elif isinstance(first, torch.Tensor):
                columns[name] = torch.cat(parts)
            else:
                columns[name] = [value for part in parts for value in part]
        return Batch(columns)

    def map(self, function: Callable[[dict[str, Any]], Mapping[str, Any]], jagged: Sequence[str] = ()) -> Batch:
        """Apply ``function`` to every row (see `rows`) and collect the rows it returns (see `from_rows`).

        Args:
            jagged: names of new per-token columns; those of this batch stay per token.
        """
        if self._size == 0:
            return self
        old = [name for name, column in self._columns.items() if isinstance(column, Jagged)]
        return Batch.from_rows([function(row) for row in self.rows()], [*old, *jagged])

    @staticmethod
    def from_rows(rows: Sequence[Mapping[str, Any]], jagged: Sequence[str] = ()) -> Batch:
        """Collect rows. Names in ``jagged`` become per-token columns; numbers and tensors dense (Python floats as
        float32); the rest objects."""
        columns: dict[str, Column] = {}
        for position, row in enumerate(rows):
            odd = sorted(row.keys() ^ rows[0].keys())
            if odd:
                raise BatchError(f"row {position} differs from row 0 in {', '.join(map(repr, odd))}")
        for name in rows[0] if rows else ():
            values = [row[name] for row in rows]
            try:
                if name in jagged:
                    columns[name] = Jagged.from_list(values)
                elif all(isinstance(value, torch.Tensor) for value in values):
                    columns[name] = torch.stack(values)
                elif all(isinstance(value, int | float) for value in values):
                    columns[name] = torch.tensor(values)
                else:
                    columns[name] = values
            except (BatchError, RuntimeError, TypeError, ValueError) as error:
                raise BatchError(f"the rows' {name!r} do not make a column: {error}") from error
        return Batch(columns)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Move all tensors (except ``lengths``) to ``device``."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self._changed(self._sequences().lengths, tokens=move, dense=move, objects=list)

    # --- other forms ---------------------------------------------------------------------------------------------

    def to_padded(self, **fill: float) -> dict[str, torch.Tensor | list[Any]]:
        """Plain columns, jagged ones as ``[B, max(lengths), ...]``, right-padded with ``fill[name]`` or 0."""
        for name in fill:
            self.flat(name)
        return {
            name: column.to_padded(fill.get(name, 0)) if isinstance(column, Jagged) else column
            for name, column in self._columns.items()
        }

    @staticmethod
    def from_padded(columns: Mapping[str, torch.Tensor], mask: torch.Tensor) -> Batch:
        """Make per-token columns from ``[B, S, ...]`` tensors: their entries where ``mask`` ``[B, S]`` is not 0."""
        result: dict[str, Column] = {}
        for name, padded in columns.items():
            try:
                result[name] = Jagged.from_mask(padded, mask)
            except BatchError as error:
                raise BatchError(f"column {name!r}: {error}") from None
        return Batch(result)

    def to_arrow(self) -> pa.Table:
        """Return an Arrow table over the same memory where Arrow allows (`rlcore.batch.arrow`).

        Raises:
            BatchError: a column holds what Arrow or JSON cannot (complex numbers, arbitrary objects).
        """
        from rlcore.batch import arrow

        return arrow.to_arrow(self._columns)

    @staticmethod
    def from_arrow(table: pa.Table) -> Batch:
        """Return the batch of which `to_arrow` made ``table``, over the table's memory where Arrow allows.

        Raises:
            DataError: the table does not come from `to_arrow`.
        """
        from rlcore.batch import arrow

        return Batch.concat([Batch(columns) for columns in arrow.from_arrow(table)])

    def save(self, path: str | Path) -> None:
        """Write Arrow IPC (``.arrow``) or Parquet (``.parquet``), by the file's ending, atomically."""
        from rlcore.batch import arrow

        arrow.save(self._columns, Path(path))

    @staticmethod
    def load(path: str | Path) -> Batch:
        """Read what `save` wrote. An ``.arrow`` file is mapped into memory, not read.

        Raises:
            DataError: the file is missing, damaged, or was not written by `save`.
        """
        from rlcore.batch import arrow

        with arrow.reading(Path(path)):
            return Batch.concat([Batch(columns) for columns in arrow.load(Path(path))])


def _as_column(name: str, given: Any) -> Column:
    if isinstance(given, np.ndarray):
        given = torch.as_tensor(given) if given.dtype.kind in "biufc" else given.tolist()
    if isinstance(given, torch.Tensor) and given.dim() == 0:
        raise BatchError(f"column {name!r} is a scalar: a dense column has one row per sample")
    if isinstance(given, torch.Tensor | Jagged):
        return given
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise BatchError(f"column {name!r} is of type {type(given).__name__}; give a tensor, a Jagged or a list")
    return list(given)


def _layout(column: Column) -> tuple[Any, ...]:
    """Return what columns must have in common to be concatenated."""
    if isinstance(column, Jagged):
        return "jagged", column.values.dtype, column.values.shape[1:], column.values.device
    if isinstance(column, torch.Tensor):
        return "dense", column.dtype, column.shape[1:], column.device
    return ("objects",)


def _shape(column: Column) -> str:
    if isinstance(column, Jagged):
        return f"jagged {dtype_name(column.values.dtype)} {list(column.values.shape)} on {column.values.device}"
    if isinstance(column, torch.Tensor):
        return f"dense {dtype_name(column.dtype)} {list(column.shape)} on {column.device}"
    return f"objects [{len(column)}]"


def _equal(left: Column, right: Column) -> bool:
    if isinstance(left, Jagged) and isinstance(right, Jagged):
        return torch.equal(left.lengths, right.lengths) and _equal(left.values, right.values)
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return np.array_equal(to_numpy(left).reshape(-1).view(np.uint8), to_numpy(right).reshape(-1).view(np.uint8))
    return type(left) is type(right) and left == right


def _unpickle(columns: dict[str, tuple[bool, Any]], lengths: torch.Tensor) -> Batch:
    return Batch({name: Jagged(value, lengths) if jagged else value for name, (jagged, value) in columns.items()})
