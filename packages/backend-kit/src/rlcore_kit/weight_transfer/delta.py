"""Lossless sparse deltas: only the elements whose bits changed since the last version.

Both sides keep the weights as they were sent last, on the host. Tensors are cut into blocks, and each block takes the
smallest of several encodings. All compare bits as unsigned integers, so that NaN, -0.0 and every other pattern is
kept.

Which elements (``n`` in the block, ``c`` changed):

======== ==============================================================================
``all``  every element has a value: 0 bytes
``bits`` one bit per element: ``n / 8`` bytes
``gap1`` the number of unchanged elements before each changed one, in bytes; 255 stands
         for "255, and more follows": about ``c`` bytes if every 50th element changed
``gap2`` the same in 16-bit numbers
======== ==============================================================================

Their values: ``raw`` (the new bits), or ``step``: the difference of new and old bits as one signed byte, with the raw
bits of those that it does not hold behind. A small optimizer step moves a number to a neighbour in its format, so most
fit. A block of which none of it is smaller goes ``full``, and one without changes takes nothing.
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
# Which, how, count of changed elements, bytes of the positions, bytes of the values.
Block = tuple[str, str, int, int, int]
Base = tuple[str, int]

# Small enough for the caches and for little scratch memory, large enough for numpy and for the description of a block.
_BLOCK_ELEMENTS = 1 << 18
_SAME: Block = ("none", "raw", 0, 0, 0)
_GAPS: dict[str, type[np.unsignedinteger[Any]]] = {"gap1": np.uint8, "gap2": np.uint16}
_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_NO_STEP = -128


class DeltaEncoder:
    """The sender's side.

    Args:
        most_new_bytes: most memory for one bucket's encoded blocks; whatever exceeds it is sent whole, from memory that
            is there anyway.

    Attributes:
        base: which weights the copy holds: this encoder's random name and their version; None if they are no version.
        changed: elements that differed, and
        compared: elements looked at, since `begin`.
    """

    def __init__(self, most_new_bytes: int = 1 << 62) -> None:
        self.base: Base | None = None
        self.changed = self.compared = 0
        self._name = uuid4().hex
        self._most_new_bytes = most_new_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._seen: set[str] = set()

    def begin(self) -> None:
        """Start a version; until `finish` the copy is none."""
        self.base = None
        self.changed = self.compared = 0
        self._seen = set()

    def encode(self, bucket: WeightBucket, whole: bool) -> Payload:
        """What to send for the bucket; its tensors may go afterwards.

        Args:
            whole: the receivers do not hold `base`: send every tensor whole.
        """
        payload = Payload(checksum=0)
        left = self._most_new_bytes
        for name, tensor in bucket.tensors:
            self._seen.add(name)
            held = self._held.get(name)
            known = held is not None and held.dtype == tensor.dtype and held.shape == tensor.shape
            if held is None or not known:
                held = self._held[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if whole or not known:
                held.copy_(tensor.detach())
                entry, parts = _whole(name, held)
            else:
                blocks, parts, new_bytes = self._encode_blocks(held, tensor.detach(), left)
                left -= new_bytes
                nbytes = sum(part.numel() for part in parts)
                entry = Entry(name, tensor.dtype, tuple(tensor.shape), nbytes, blocks)
            payload.entries.append(entry)
            payload.parts.append(parts)
        payload.checksum = _checksum(self._held[name] for name, _ in bucket.tensors)
        return payload

    def whole(self, names: Iterable[str]) -> Payload:
        """Tensors of the version under way, whole."""
        names = list(names)
        payload = Payload(checksum=_checksum(self._held[name] for name in names))
        for name in names:
            entry, parts = _whole(name, self._held[name])
            payload.entries.append(entry)
            payload.parts.append(parts)
        return payload

    def finish(self, version: int) -> Base:
        """All buckets were taken by all receivers."""
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
                block = _full(block[2])
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
    """A receiver's side.

    Attributes:
        base: which weights the copy holds; None if they are no version.
    """

    def __init__(self) -> None:
        self.base: Base | None = None
        self._held: dict[str, torch.Tensor] = {}
        self._seen: set[str] = set()

    def begin(self) -> None:
        """Start a version; until `finish` the copy is none."""
        self.base = None
        self._seen = set()

    def apply(self, entries: Sequence[Entry], flat: torch.Tensor, checksum: int | None) -> bool:
        """Take over a bucket from its bytes (``[n]``, on the host).

        Returns:
            False if the result is not what the sender has: the bucket must come again, whole.
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
                except (ValueError, IndexError):  # positions or lengths that cannot be: the bytes are damaged
                    return False
                at += size
        return _checksum(self._held[entry.name] for entry in entries) == checksum

    def bucket(self, entries: Sequence[Entry], device: torch.device) -> WeightBucket:
        """Copies of the tensors: the receiver may keep them while the next version comes."""
        return WeightBucket(
            tuple((entry.name, self._held[entry.name].to(device, copy=True)) for entry in entries),
        )

    def finish(self, base: Base) -> None:
        """All buckets have come."""
        self._held = {name: tensor for name, tensor in self._held.items() if name in self._seen}
        self.base = base


def encode_block(old: Bits, new: Bits) -> tuple[Block, list[Bits]]:
    """The smallest encoding of ``new`` (bits ``[n]``) given ``old``, and its bytes."""
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
    if count < positions["bits"]:  # otherwise gaps take more
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
            return _full(count), []
        case "all":
            arrays = _steps(old, new)
            return ("all", "step", count, 0, sum(array.nbytes for array in arrays)), arrays
    place = np.packbits(differs) if where == "bits" else _encode_gaps(gaps, _GAPS[where])
    arrays = [new_values] if how == "raw" else _steps(old_values, new_values)
    return (where, how, count, place.nbytes, sum(array.nbytes for array in arrays)), [place, *arrays]


def decode_block(bits: Bits, block: Block, data: npt.NDArray[np.uint8]) -> None:
    """Make ``bits`` (``[n]``, in place) what `encode_block` was given as new.

    Raises:
        ValueError, IndexError: the data cannot belong to this block; ``bits`` may be partly changed.
    """
    where, how, count, place_bytes, _ = block
    if where == "none":
        return
    if how == "full":
        bits[:] = data.view(bits.dtype)
        return
    place, values = data[:place_bytes], data[place_bytes:]
    if where == "all":
        bits[:] = _unsteps(bits, values)
        return
    if where == "bits":
        changed = np.flatnonzero(np.unpackbits(place, count=len(bits)))
    else:
        changed = _decode_gaps(place.view(_GAPS[where]))
    if len(changed) != count:
        raise ValueError(f"{len(changed)} positions instead of {count}")
    bits[changed] = values.view(bits.dtype) if how == "raw" else _unsteps(bits[changed], values)


def _full(count: int) -> Block:
    return ("all", "full", count, 0, 0)


def _encode_gaps(gaps: npt.NDArray[np.int64], dtype: type[np.unsignedinteger[Any]]) -> Bits:
    most = np.iinfo(dtype).max
    ends = np.cumsum(gaps // most + 1) - 1
    codes = np.full(int(ends[-1]) + 1, most, dtype)
    codes[ends] = (gaps % most).astype(dtype)
    return codes


def _decode_gaps(codes: Bits) -> npt.NDArray[np.int64]:
    ends = codes != np.iinfo(codes.dtype).max
    skipped: npt.NDArray[np.int64] = np.cumsum(codes, dtype=np.int64)[ends]
    return skipped + np.arange(len(skipped))


def _difference(old: Bits, new: Bits) -> Bits:
    return (new - old).view(_SIGNED[new.itemsize])


def _beyond(old: Bits, new: Bits) -> npt.NDArray[np.bool_]:
    """Which differences a signed byte does not hold; one value is kept to say so."""
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
    """The bytes ``[m * itemsize]`` as unsigned integers ``[m]``, in place; complex numbers as their parts."""
    return data.numpy().view(_UNSIGNED[min(itemsize, 8)])


def _block_ranges(nbytes: int, itemsize: int) -> Iterator[tuple[int, int]]:
    step = _BLOCK_ELEMENTS * itemsize
    for start in range(0, nbytes, step):
        yield start, min(start + step, nbytes)


def _whole(name: str, held: torch.Tensor) -> tuple[Entry, list[torch.Tensor]]:
    return Entry(name, held.dtype, tuple(held.shape), held.nbytes), [held]


def _checksum(tensors: Iterable[torch.Tensor]) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(as_bytes(tensor).numpy().data, value)
    return value
