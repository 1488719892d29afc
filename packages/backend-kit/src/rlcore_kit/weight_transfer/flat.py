"""The byte layout of buckets: pack tensors into one run of bytes, and unpack them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from rlcore.engines.weight_bucket import WeightBucket

# Tensors start at multiples of this, so that views of any dtype are aligned.
_ALIGNMENT = 16

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class Entry:
    """Description of one tensor in a payload.

    Attributes:
        nbytes: number of bytes that are sent for it.
        blocks: None if these bytes are the tensor's; otherwise the encoding of its blocks
            (`rlcore_kit.weight_transfer.delta`).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    blocks: tuple[tuple[Any, ...], ...] | None = None

    @property
    def full_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def to_json(self) -> list[Any]:
        """Return the fields as JSON values."""
        return [self.name, str(self.dtype).removeprefix("torch."), self.shape, self.nbytes, self.blocks]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Entry:
        """Make an entry from what `to_json` returned."""
        name, dtype, shape, nbytes, blocks = fields
        return cls(name, _DTYPES[dtype], tuple(shape), nbytes, None if blocks is None else tuple(map(tuple, blocks)))


@dataclass
class Payload:
    """What is sent for one bucket: entries and, for each, the tensors whose concatenated bytes are sent.

    Attributes:
        checksum: CRC-32 of the tensors that the receiver must hold afterwards; None if nothing is verified.
    """

    entries: list[Entry] = field(default_factory=list)
    parts: list[list[torch.Tensor]] = field(default_factory=list)
    checksum: int | None = None

    @property
    def nbytes(self) -> int:
        """Length of the run of bytes, including the gaps for alignment."""
        return flat_bytes(self.entries)


def pack(bucket: WeightBucket) -> Payload:
    """Describe the bucket's bytes as a payload; nothing is copied yet."""
    payload = Payload()
    for name, tensor in bucket.tensors:
        payload.entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes))
        payload.parts.append([tensor.detach()])
    return payload


def unpack(flat: torch.Tensor, entries: Sequence[Entry]) -> WeightBucket:
    """Return the tensors as views of ``flat`` (bytes ``[n]``)."""
    return WeightBucket(
        tuple(
            (entry.name, _view(flat[start : start + entry.nbytes], entry))
            for entry, start in zip(entries, offsets(entries))
        )
    )


def offsets(entries: Sequence[Entry]) -> list[int]:
    """Return the byte at which each entry starts."""
    starts, end = [], 0
    for entry in entries:
        starts.append(end)
        end += _aligned(entry.nbytes)
    return starts


def flat_bytes(entries: Sequence[Entry]) -> int:
    """Return the length of the run of bytes of all entries."""
    return sum(_aligned(entry.nbytes) for entry in entries)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's bytes ``[nbytes]``: a view of the tensor if it is contiguous, otherwise of a copy."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class PieceReader:
    """Reads a payload sequentially, in pieces of any size.

    A tensor that is not contiguous is copied when it is read, one at a time.
    """

    def __init__(self, payload: Payload) -> None:
        self._chunks = self._all_chunks(payload)
        self._chunk: torch.Tensor | int = 0
        self._at = 0

    def read_into(self, piece: torch.Tensor) -> None:
        """Fill ``piece`` (bytes ``[n]``, on any device); bytes between tensors are left unchanged."""
        filled = 0
        while filled < piece.numel():
            size = self._chunk if isinstance(self._chunk, int) else self._chunk.numel()
            if self._at == size:
                self._chunk, self._at = next(self._chunks), 0
                continue
            step = min(size - self._at, piece.numel() - filled)
            if isinstance(self._chunk, torch.Tensor):
                piece[filled : filled + step].copy_(self._chunk[self._at : self._at + step])
            self._at += step
            filled += step

    @staticmethod
    def _all_chunks(payload: Payload) -> Iterator[torch.Tensor | int]:
        """Yield the bytes of every part, and between them the number of bytes to skip."""
        for entry, parts in zip(payload.entries, payload.parts):
            for part in parts:
                yield as_bytes(part)
            yield _aligned(entry.nbytes) - entry.nbytes


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _view(data: torch.Tensor, entry: Entry) -> torch.Tensor:
    if data.numel() == 0:  # its offset may violate the alignment of the dtype
        return torch.empty(entry.shape, dtype=entry.dtype, device=data.device)
    return data.view(entry.dtype).view(entry.shape)
