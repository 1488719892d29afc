"""Lossless sparse deltas: only the elements whose bits changed since the last version.

Use deltas where the network between trainer and rollouts is slow; between processes of one host a full transfer is two
to three times faster.

Both sides keep the weights that were sent last, on the host. Tensors are divided into blocks, and each block uses the
smallest of several encodings. All of them compare bits as unsigned integers, so that NaN, -0.0 and every other bit
pattern is preserved.

Positions of the changed elements (``n`` elements in the block, ``c`` changed):

======== ==============================================================================
``all``  every element has a value: 0 bytes
``bits`` one bit per element: ``n / 8`` bytes
``gap1`` the number of unchanged elements before each changed one, in bytes; 255 means
         "255, and more follows": about ``c`` bytes if every 50th element changed
``gap2`` the same in 16-bit numbers
======== ==============================================================================

Values of the changed elements: ``raw`` (the new bits), or ``step``: the difference of new and old bits as one signed
byte, followed by the raw bits of the elements whose difference does not fit. A small optimizer step moves a number to a
neighbour in its format, so most fit. A block for which neither is smaller is sent ``full``; a block without changes
takes no bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch

from rlcore.engines.weight_bucket import WeightBucket
from rlcore_kit.weight_transfer.flat import Entry, Payload, as_bytes, offsets

Bits = npt.NDArray[Any]
# Encoding of positions, encoding of values, number of changed elements, bytes of the positions, bytes of the values.
Block = tuple[str, str, int, int, int]
Base = tuple[str, int]

# Small enough for CPU caches and for little temporary memory, large enough to make the cost per block negligible.
_BLOCK_ELEMENTS = 1 << 18
_SAME: Block = ("none", "raw", 0, 0, 0)
_GAPS: dict[str, type[np.unsignedinteger[Any]]] = {"gap1": np.uint8, "gap2": np.uint16}
_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_NO_STEP = -128


class DeltaEncoder:
    """The sender's side: compares the weights with a copy and encodes the differences.

    Args:
        max_new_bytes: maximum memory for the encoded blocks of one bucket; blocks beyond it are sent in full, from
            memory that exists anyway.

    Attributes:
        base: identity of the weights in the copy: this encoder's random name and their version; None while the copy is
            incomplete.
        changed: number of elements that differed since `begin`.
        compared: number of elements compared since `begin`.
    """

    def __init__(self, max_new_bytes: int = 1 << 62) -> None:
        self.base: Base | None = None
        self.changed = self.compared = 0
        self._name = uuid4().hex
        self._max_new_bytes = max_new_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._seen: set[str] = set()

    def begin(self) -> None:
        """Start a version; the copy is incomplete until `finish`."""
        self.base = None
        self.changed = self.compared = 0
        self._seen = set()

    def encode(self, bucket: WeightBucket, full: bool) -> Payload:
        """Return what to send for the bucket; its tensors are not needed afterwards.

        Args:
            full: send every tensor in full, because the receivers do not hold `base`.
        """
        payload = Payload(checksum=0)
        left = self._max_new_bytes
        for name, tensor in bucket.tensors:
            self._seen.add(name)
            held = self._held.get(name)
            known = held is not None and held.dtype == tensor.dtype and held.shape == tensor.shape
            if held is None or not known:
                held = self._held[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if full or not known:
                held.copy_(tensor.detach())
                entry, parts = _full_entry(name, held)
            else:
                blocks, parts, new_bytes = self._encode_blocks(held, tensor.detach(), left)
                left -= new_bytes
                nbytes = sum(part.numel() for part in parts)
                entry = Entry(name, tensor.dtype, tuple(tensor.shape), nbytes, blocks)
            payload.entries.append(entry)
            payload.parts.append(parts)
        payload.checksum = _checksum(self._held[name] for name, _ in bucket.tensors)
        return payload

    def encode_full(self, names: Iterable[str]) -> Payload:
        """Return the named tensors of the version that is being sent, in full."""
        names = list(names)
        payload = Payload(checksum=_checksum(self._held[name] for name in names))
        for name in names:
            entry, parts = _full_entry(name, self._held[name])
            payload.entries.append(entry)
            payload.parts.append(parts)
        return payload

    def finish(self, version: int) -> Base:
        """End the version, after all receivers have all buckets; return the new `base`."""
        self._held = {name: tensor for name, tensor in self._held.items() if name in self._seen}
        self.base = (self._name, version)
        return self.base

    def _encode_blocks(
        self, held: torch.Tensor, tensor: torch.Tensor, left: int
    ) -> tuple[tuple[Block, ...], list[torch.Tensor], int]:
        held_bytes, new_bytes = as_bytes(held), as_bytes(tensor)
        blocks: list[Block] = []
        parts: list[torch.Tensor] = []
        used = 0
        for start, stop in _block_ranges(held.nbytes, held.dtype.itemsize):
            old = _bits(held_bytes[start:stop], held.dtype.itemsize)
            new = _bits(new_bytes[start:stop].cpu(), held.dtype.itemsize)
            block, arrays = encode_block(old, new)
            size = sum(array.nbytes for array in arrays)
            if used + size > left:
                block = _full_block(block[2])
            old[:] = new
            self.changed += block[2]
            self.compared += len(new)
            blocks.append(block)
            if block[1] == "full":
                parts.append(held_bytes[start:stop])
            else:
                used += size
                parts += [torch.from_numpy(array.view(np.uint8)) for array in arrays]
        return tuple(blocks), parts, used


class DeltaDecoder:
    """The receiver's side: applies encoded differences to a copy of the weights.

    Attributes:
        base: identity of the weights in the copy, see `DeltaEncoder`; None while the copy is incomplete.
    """

    def __init__(self) -> None:
        self.base: Base | None = None
        self._held: dict[str, torch.Tensor] = {}
        self._seen: set[str] = set()

    def begin(self) -> None:
        """Start a version; the copy is incomplete until `finish`."""
        self.base = None
        self._seen = set()

    def apply(self, entries: Sequence[Entry], flat: torch.Tensor, checksum: int | None) -> bool:
        """Update the copy with a bucket's bytes ``flat`` (``[n]``, on the host).

        Returns:
            False if the result differs from the sender's weights: the bucket must be sent again in full.
        """
        data = flat.numpy()
        for entry, start in zip(entries, offsets(entries)):
            self._seen.add(entry.name)
            held = self._held.get(entry.name)
            if held is None or held.dtype != entry.dtype or held.shape != torch.Size(entry.shape):
                if entry.blocks is not None:
                    return False
                held = self._held[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
            source = data[start : start + entry.nbytes]
            target = as_bytes(held)
            if entry.blocks is None:
                target.numpy()[:] = source
                continue
            at = 0
            for block, (first, last) in zip(entry.blocks, _block_ranges(held.nbytes, held.dtype.itemsize), strict=True):
                bits = _bits(target[first:last], held.dtype.itemsize)
                size = bits.nbytes if block[1] == "full" else block[3] + block[4]
                try:
                    decode_block(bits, block, source[at : at + size])
                except (ValueError, IndexError):  # impossible positions or lengths: the bytes are damaged
                    return False
                at += size
        return _checksum(self._held[entry.name] for entry in entries) == checksum

    def bucket(self, entries: Sequence[Entry], device: torch.device) -> WeightBucket:
        """Return copies of the tensors, which the receiver may keep while the next version arrives."""
        return WeightBucket(
            tuple((entry.name, self._held[entry.name].to(device, copy=True)) for entry in entries),
        )

    def finish(self, base: Base) -> None:
        """End the version, after the last bucket."""
        self._held = {name: tensor for name, tensor in self._held.items() if name in self._seen}
        self.base = base


def encode_block(old: Bits, new: Bits) -> tuple[Block, list[Bits]]:
    """Return the smallest encoding of ``new`` (bits ``[n]``) given ``old``, and its bytes."""
    n, itemsize = len(new), new.itemsize
    differs = old != new
    changed = np.flatnonzero(differs)
    count = len(changed)
    if count == 0:
        return _SAME, []
    old_values, new_values = old[changed], new[changed]
    beyond = _beyond(old_values, new_values)
    exceptions = int(np.count_nonzero(beyond)) * itemsize
    positions = {"bits": -(-n // 8)}
    if count < positions["bits"]:  # otherwise gaps take more bytes
        gaps = np.diff(changed, prepend=-1) - 1
        for kind, dtype in _GAPS.items():
            positions[kind] = (count + int((gaps // np.iinfo(dtype).max).sum())) * np.dtype(dtype).itemsize
    values = {"raw": count * itemsize, "step": count + exceptions}
    where, how = min(positions, key=lambda kind: positions[kind]), min(values, key=lambda kind: values[kind])
    sizes = {
        "full": n * itemsize,
        "all": n + exceptions,  # as steps; an unchanged element is a step of zero
        "sparse": positions[where] + values[how],
    }
    match min(sizes, key=lambda kind: sizes[kind]):
        case "full":
            return _full_block(count), []
        case "all":
            arrays = _steps(old, new)
            return ("all", "step", count, 0, sum(array.nbytes for array in arrays)), arrays
    encoded = np.packbits(differs) if where == "bits" else _encode_gaps(gaps, _GAPS[where])
    arrays = [new_values] if how == "raw" else _steps(old_values, new_values)
    return (where, how, count, encoded.nbytes, sum(array.nbytes for array in arrays)), [encoded, *arrays]


def decode_block(bits: Bits, block: Block, data: npt.NDArray[np.uint8]) -> None:
    """Change ``bits`` (``[n]``) from the old to the new bits of `encode_block`, in place.

    Raises:
        ValueError, IndexError: the data cannot belong to this block; ``bits`` may be partly changed.
    """
    where, how, count, position_bytes, _ = block
    if where == "none":
        return
    if how == "full":
        bits[:] = data.view(bits.dtype)
        return
    positions, values = data[:position_bytes], data[position_bytes:]
    if where == "all":
        bits[:] = _unsteps(bits, values)
        return
    if where == "bits":
        changed = np.flatnonzero(np.unpackbits(positions, count=len(bits)))
    else:
        changed = _decode_gaps(positions.view(_GAPS[where]))
    if len(changed) != count:
        raise ValueError(f"{len(changed)} positions instead of {count}")
    bits[changed] = values.view(bits.dtype) if how == "raw" else _unsteps(bits[changed], values)


def _full_block(count: int) -> Block:
    return ("all", "full", count, 0, 0)


def _encode_gaps(gaps: npt.NDArray[np.int64], dtype: type[np.unsignedinteger[Any]]) -> Bits:
    maximum = np.iinfo(dtype).max
    ends = np.cumsum(gaps // maximum + 1) - 1
    codes = np.full(int(ends[-1]) + 1, maximum, dtype)
    codes[ends] = (gaps % maximum).astype(dtype)
    return codes


def _decode_gaps(codes: Bits) -> npt.NDArray[np.int64]:
    ends = codes != np.iinfo(codes.dtype).max
    skipped: npt.NDArray[np.int64] = np.cumsum(codes, dtype=np.int64)[ends]
    return skipped + np.arange(len(skipped))


def _difference(old: Bits, new: Bits) -> Bits:
    return (new - old).view(_SIGNED[new.itemsize])


def _beyond(old: Bits, new: Bits) -> npt.NDArray[np.bool_]:
    """Mark the differences that do not fit in a signed byte; `_NO_STEP` is reserved as their marker."""
    difference = _difference(old, new)
    beyond: npt.NDArray[np.bool_] = (difference <= _NO_STEP) | (difference > 127)
    return beyond


def _steps(old: Bits, new: Bits) -> list[Bits]:
    beyond = _beyond(old, new)
    steps = _difference(old, new).astype(np.int8)
    steps[beyond] = _NO_STEP
    return [steps, new[beyond]]


def _unsteps(old: Bits, data: npt.NDArray[np.uint8]) -> Bits:
    steps = data[: len(old)].view(np.int8)
    new: Bits = old + steps.astype(_SIGNED[old.itemsize]).view(old.dtype)
    new[steps == _NO_STEP] = data[len(old) :].view(old.dtype)
    return new


def _bits(data: torch.Tensor, itemsize: int) -> Bits:
    """View the bytes ``[m * itemsize]`` as unsigned integers ``[m]``; complex numbers as their parts."""
    return data.numpy().view(_UNSIGNED[min(itemsize, 8)])


def _block_ranges(nbytes: int, itemsize: int) -> Iterator[tuple[int, int]]:
    step = _BLOCK_ELEMENTS * itemsize
    for start in range(0, nbytes, step):
        yield start, min(start + step, nbytes)


def _full_entry(name: str, held: torch.Tensor) -> tuple[Entry, list[torch.Tensor]]:
    return Entry(name, held.dtype, tuple(held.shape), held.nbytes), [held]


def _checksum(tensors: Iterable[torch.Tensor]) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(as_bytes(tensor).numpy().data, value)
    return value
