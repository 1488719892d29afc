"""`Batch`: an immutable, columnar, padding-free set of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlcore.batch.balance import balanced_partitions
from rlcore.errors import BatchError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, eq=False)
class Jagged:
    """A per-token column: sequences of different lengths, stored one after another.

    Attributes:
        values: ``[T, ...]``, any dtype and device.
        lengths: ``[B]`` int64 on the CPU, summing to ``T``.
    """

    values: torch.Tensor
    lengths: torch.Tensor

    def __post_init__(self) -> None:
        lengths = torch.as_tensor(self.lengths, dtype=torch.int64, device="cpu")
        object.__setattr__(self, "lengths", lengths)
        if lengths.dim() != 1 or bool((lengths < 0).any()):
            raise BatchError(f"lengths must be one row of non-negative integers, not shape {list(lengths.shape)}")
        if int(lengths.sum()) != len(self.values):
            raise BatchError(f"lengths sum to {int(lengths.sum())} but values has shape {list(self.values.shape)}")

    @classmethod
    def from_list(cls, rows: Sequence[torch.Tensor | Sequence[Any]], dtype: torch.dtype | None = None) -> Jagged:
        """Join one tensor (or list of numbers) per sample."""
        tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
        values = torch.cat(tensors) if tensors else torch.empty(0, dtype=dtype)
        return cls(values, torch.tensor([len(tensor) for tensor in tensors], dtype=torch.int64))

    @classmethod
    def from_padded(cls, padded: torch.Tensor, lengths: torch.Tensor) -> Jagged:
        """Take the first ``lengths[i]`` entries of each row of ``padded`` ``[B, S, ...]``."""
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
        if len(lengths) != len(padded) or (len(lengths) and int(lengths.max()) > padded.shape[1]):
            raise BatchError(f"lengths {list(lengths.shape)} do not fit padded rows of shape {list(padded.shape)}")
        keep = torch.arange(padded.shape[1])[None] < lengths[:, None]
        return cls(padded[keep.to(padded.device)], lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> torch.Tensor:
        """``[B + 1]`` int64: sequence *i* is ``values[offsets[i]:offsets[i + 1]]``."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    def to_list(self) -> list[torch.Tensor]:
        """One view per sample."""
        return list(self.values.split(self.lengths.tolist()))

    def to_padded(self, value: float = 0) -> torch.Tensor:
        """``[B, max(lengths), ...]``, right-padded with ``value``."""
        width = int(self.lengths.max()) if len(self) else 0
        padded = self.values.new_full((len(self), width, *self.values.shape[1:]), value)
        keep = torch.arange(width)[None] < self.lengths[:, None]
        padded[keep.to(self.values.device)] = self.values
        return padded

    def with_values(self, values: torch.Tensor) -> Jagged:
        """The same sequences with other values ``[T, ...]``."""
        return Jagged(values, self.lengths)

    def take(self, indices: torch.Tensor) -> Jagged:
        """The sequences at ``indices`` ``[N]``, in that order, copied."""
        lengths = self.lengths[indices]
        starts = self.offsets[:-1][indices]
        shift = starts - (lengths.cumsum(0) - lengths)
        positions = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
        return Jagged(self.values[positions.to(self.values.device)], lengths)


Column = torch.Tensor | Jagged | list[Any]


class Batch:
    """Samples in columns.

    A column is *dense* (a ``[B, ...]`` tensor), *jagged* (`Jagged`, per token) or *objects* (a list of plain values).
    All jagged columns of a batch share one ``lengths``: entry *t* of each speaks of ``tokens[t]`` given what came before
    (`rlcore.batch.alignment`). All tensors share one device; ``lengths`` stays on the CPU.

    A batch never changes: operations return new batches that share storage where they can.

    Raises:
        BatchError: columns of different sizes, lengths or devices; the message names the column and both shapes.
    """

    __slots__ = ("_columns", "_lengths", "_size")

    def __init__(self, columns: Mapping[str, Column | Sequence[Any]]) -> None:
        self._columns: dict[str, Column] = {}
        self._lengths: torch.Tensor | None = None
        self._size = 0
        first: str | None = None
        device: tuple[str, torch.device] | None = None
        jagged: str | None = None
        for name, given in columns.items():
            column: Column = given if isinstance(given, torch.Tensor | Jagged) else list(given)
            if isinstance(column, torch.Tensor) and column.dim() == 0:
                raise BatchError(f"column {name!r} is a scalar: a dense column has one row per sample")
            if first is None:
                first, self._size = name, len(column)
            elif len(column) != self._size:
                raise BatchError(
                    f"column {name!r} has {len(column)} samples ({_shape(column)}) but column {first!r} has "
                    f"{self._size} ({_shape(self._columns[first])})"
                )
            if isinstance(column, Jagged):
                if self._lengths is None:
                    self._lengths, jagged = column.lengths, name
                elif self._lengths is not column.lengths and not torch.equal(self._lengths, column.lengths):
                    row = int((self._lengths != column.lengths).nonzero()[0])
                    raise BatchError(
                        f"column {name!r} ({_shape(column)}) and column {jagged!r} have different lengths, first at "
                        f"sample {row}: {int(column.lengths[row])} and {int(self._lengths[row])}"
                    )
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

    # --- reading -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._size

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Any:
        """The column itself: a tensor, a `Jagged` or a list."""
        try:
            return self._columns[name]
        except KeyError:
            raise BatchError(f"no column {name!r}; the batch has {', '.join(self._columns) or 'none'}") from None

    def flat(self, name: str) -> torch.Tensor:
        """The values ``[T, ...]`` of a jagged column."""
        column = self[name]
        if not isinstance(column, Jagged):
            raise BatchError(f"column {name!r} ({_shape(column)}) is not per token")
        return column.values

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._columns)

    @property
    def lengths(self) -> torch.Tensor:
        """``[B]`` int64 on the CPU: tokens per sample."""
        if self._lengths is None:
            raise BatchError(f"the batch has no per-token column, only {', '.join(self._columns) or 'none'}")
        return self._lengths

    @property
    def total_tokens(self) -> int:
        return int(self.lengths.sum())

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dict per sample: scalars and tensors of dense columns, 1-D views of jagged ones, the objects."""
        split = {n: c.to_list() if isinstance(c, Jagged) else c for n, c in self._columns.items()}
        for index in range(self._size):
            yield {name: column[index] for name, column in split.items()}

    def __repr__(self) -> str:
        if not self._columns:
            return "Batch(empty)"
        tokens = f", {self.total_tokens} tokens" if self._lengths is not None else ""
        width = max(map(len, self._columns))
        lines = [f"  {name:<{width}}  {_shape(column)}" for name, column in self._columns.items()]
        return "\n".join([f"Batch({self._size} samples{tokens})", *lines])

    # --- columns -------------------------------------------------------------------------------------------------

    def select(self, *names: str) -> Batch:
        return Batch({name: self[name] for name in names})

    def drop(self, *names: str) -> Batch:
        for name in names:
            self[name]
        return Batch({name: column for name, column in self._columns.items() if name not in names})

    def with_columns(self, **columns: Column | Sequence[Any]) -> Batch:
        """Add or replace columns. A tensor is dense; wrap per-token values with `jagged`."""
        return Batch({**self._columns, **columns})

    def jagged(self, values: torch.Tensor) -> Jagged:
        """Per-token values ``[T, ...]`` as a column of this batch."""
        return Jagged(values, self.lengths)

    def union(self, other: Batch) -> Batch:
        """The columns of both; a name that both have is an error."""
        clash = [name for name in other.names if name in self._columns]
        if clash:
            raise BatchError(f"both batches have column {clash[0]!r}; drop or rename one before the union")
        return Batch({**self._columns, **other._columns})

    # --- samples -------------------------------------------------------------------------------------------------

    def take(self, indices: torch.Tensor | Sequence[int]) -> Batch:
        """The samples at ``indices``, in that order, repeats allowed."""
        index = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        if len(index) and (int(index.min()) < -self._size or int(index.max()) >= self._size):
            raise BatchError(f"index {int(index.abs().max())} is outside a batch of {self._size} samples")
        index = index % max(self._size, 1)
        chosen = index.tolist()
        columns: dict[str, Column] = {}
        for name, column in self._columns.items():
            if isinstance(column, Jagged):
                columns[name] = column.take(index)
            elif isinstance(column, torch.Tensor):
                columns[name] = column[index.to(column.device)]
            else:
                columns[name] = [column[i] for i in chosen]
        return Batch(columns)

    def slice(self, start: int, stop: int) -> Batch:
        """Samples ``start`` to ``stop`` (exclusive), as views."""
        start, stop, _ = slice(start, stop).indices(self._size)
        columns: dict[str, Column] = {}
        for name, column in self._columns.items():
            if isinstance(column, Jagged):
                begin, end = (int(column.lengths[:edge].sum()) for edge in (start, max(start, stop)))
                columns[name] = Jagged(column.values[begin:end], column.lengths[start:stop])
            else:
                columns[name] = column[start:stop]
        return Batch(columns)

    def split(self, size: int) -> list[Batch]:
        """Consecutive batches of ``size`` samples; the last may be smaller."""
        if size < 1:
            raise BatchError(f"cannot split into batches of {size} samples")
        return [self.slice(start, start + size) for start in range(0, self._size, size)]

    def partition(self, parts: int) -> list[list[int]]:
        """Indices for ``parts`` ranks, balanced by token count (`balanced_partitions`)."""
        lengths = self._lengths.tolist() if self._lengths is not None else [1] * self._size
        return balanced_partitions(lengths, parts)

    def repeat(self, n: int) -> Batch:
        """Each sample ``n`` times in a row: a b → a a b b."""
        return self.take(torch.arange(self._size).repeat_interleave(n))

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """Samples of all batches in order; all need the same columns."""
        if not batches:
            return Batch({})
        names = batches[0].names
        columns: dict[str, Column] = {}
        for position, batch in enumerate(batches):
            if set(batch.names) != set(names):
                odd = sorted(set(batch.names) ^ set(names))
                raise BatchError(f"batch {position} differs from batch 0 in columns {', '.join(odd)}")
        for name in names:
            parts = [batch[name] for batch in batches]
            kinds = {type(part) for part in parts}
            if len(kinds) > 1:
                raise BatchError(
                    f"column {name!r} is {' and '.join(sorted(k.__name__ for k in kinds))} in different batches"
                )
            try:
                if isinstance(parts[0], Jagged):
                    values = torch.cat([part.values for part in parts])
                    columns[name] = Jagged(values, torch.cat([part.lengths for part in parts]))
                elif isinstance(parts[0], torch.Tensor):
                    columns[name] = torch.cat(parts)
                else:
                    columns[name] = [value for part in parts for value in part]
            except RuntimeError as error:
                shapes = ", ".join(_shape(part) for part in parts)
                raise BatchError(f"column {name!r} cannot be concatenated ({shapes}): {error}") from None
        return Batch(columns)

    def map(self, function: Callable[[dict[str, Any]], dict[str, Any]]) -> Batch:
        """Apply ``function`` to every row (see `rows`) and collect the rows it returns."""
        return Batch.from_rows(
            [function(row) for row in self.rows()],
            jagged=[name for name, column in self._columns.items() if isinstance(column, Jagged)],
        )

    @staticmethod
    def from_rows(rows: Sequence[Mapping[str, Any]], jagged: Sequence[str] = ()) -> Batch:
        """Collect rows. Names in ``jagged`` become per-token columns; numbers and tensors dense; the rest objects."""
        columns: dict[str, Column] = {}
        for name in rows[0] if rows else ():
            values = [row[name] for row in rows]
            if name in jagged:
                columns[name] = Jagged.from_list(values)
            elif all(isinstance(value, torch.Tensor) for value in values):
                columns[name] = torch.stack(values)
            elif all(isinstance(value, int | float) for value in values):
                columns[name] = torch.tensor(values)
            else:
                columns[name] = values
        return Batch(columns)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        columns: dict[str, Column] = {}
        for name, column in self._columns.items():
            if isinstance(column, Jagged):
                columns[name] = Jagged(column.values.to(device, non_blocking=non_blocking), column.lengths)
            elif isinstance(column, torch.Tensor):
                columns[name] = column.to(device, non_blocking=non_blocking)
            else:
                columns[name] = column
        return Batch(columns)

    # --- storage -------------------------------------------------------------------------------------------------

    def to_arrow(self) -> pa.Table:
        from rlcore.batch.arrow import to_arrow

        return to_arrow(self)

    @staticmethod
    def from_arrow(table: pa.Table) -> Batch:
        from rlcore.batch.arrow import from_arrow

        return from_arrow(table)

    def save(self, path: str | Path) -> None:
        """Write Arrow IPC (``.arrow``) or Parquet (``.parquet``), by the file's ending."""
        from rlcore.batch.arrow import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Batch:
        from rlcore.batch.arrow import load

        return load(Path(path))


def _shape(column: Column) -> str:
    if isinstance(column, Jagged):
        shape = list(column.values.shape)
        return f"jagged {column.values.dtype} {shape} over {len(column)}"
    if isinstance(column, torch.Tensor):
        return f"dense {column.dtype} {list(column.shape)}"
    return f"objects [{len(column)}]"
