"""Chunks of one text in two tokenisations: the smallest groups of tokens on both sides that have the same bytes.

Worked example, student above and teacher below (``|`` ends a token)::

    un|believ|able| is| it          bytes: 2 8 12 15 18
    unbe|liev|able| is it           bytes: 4 8 12 18

Both tokenisations have a boundary at the bytes 8, 12 and 18, so there are three chunks: ``unbeliev`` (student tokens
0, 1; teacher tokens 0, 1), ``able`` (2; 2) and `` is it`` (3, 4; 3). The log-prob of a chunk is the sum over its tokens
on either side: the chain rule, with everything before it given.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
UNSCORED = -1
"""Chunk of a token that has none."""


@dataclass(frozen=True)
class Readable:
    """Bytes as the text that a reader gets of them.

    Attributes:
        data: valid UTF-8.
        broken: parts of the original bytes that are no UTF-8, as (start, end).
        cut: the last of them is the beginning of a character and is left out of ``data``; the others are replacement
            characters there.
    """

    data: bytes
    broken: tuple[tuple[int, int], ...] = ()
    cut: bool = False


def readable(data: bytes, *, cut: bool) -> Readable:
    """Return ``data`` as valid UTF-8.

    Args:
        cut: leave the beginning of a character out at the end, as nothing follows.
    """
    kept, broken, position, left_out = bytearray(), list[tuple[int, int]](), 0, False
    while True:
        try:
            data[position:].decode()
        except UnicodeDecodeError as error:
            start, end = position + error.start, position + error.end
            kept += data[position:start]
            broken.append((start, end))
            left_out = cut and end == len(data) and "unexpected end" in error.reason
            kept += b"" if left_out else REPLACEMENT
            position = end
        else:
            kept += data[position:]
            return Readable(bytes(kept), tuple(broken), left_out)


def align(student: Sequence[bytes], teacher: Sequence[bytes], *, cut: bool = False) -> tuple[list[int], list[int]]:
    """Return the chunk of each token of the student and of the teacher, counted from 0.

    Student tokens that have a part in bytes that are no UTF-8 are `UNSCORED`, with all tokens of their chunk.

    Args:
        student: bytes of its tokens.
        teacher: bytes of its tokens, together `readable` of the student's.
        cut: see `readable`.
    """
    read = readable(b"".join(student), cut=cut)
    assert b"".join(teacher) == read.data
    raw_ends = list(accumulate(map(len, student)))
    positions = _Positions(read)
    damaged = [positions.broken(start, end) for start, end in zip([0, *raw_ends], raw_ends)]
    student_ends = [positions.moved(end) for end in raw_ends]
    teacher_ends = list(accumulate(map(len, teacher)))
    common = sorted({end for end in student_ends if end is not None} & set(teacher_ends))
    student_chunks = _chunks(student_ends, common)
    teacher_chunks = _chunks(teacher_ends, common)
    unscored = {chunk for chunk, bad in zip(student_chunks, damaged) if bad}
    # a chunk needs tokens on both sides
    unscored |= set(student_chunks) ^ set(teacher_chunks)
    return _without(student_chunks, unscored), _without(teacher_chunks, unscored)


class _Positions:
    """Positions in original bytes, and where they are in the text that was made of them."""

    def __init__(self, read: Readable) -> None:
        self._cut = read.cut
        self._starts = [start for start, _ in read.broken]
        self._ends = [end for _, end in read.broken]
        # how much longer the text is after the first parts
        self._longer = [0, *accumulate(len(REPLACEMENT) - (end - start) for start, end in read.broken)]

    def broken(self, start: int, end: int) -> bool:
        """Return whether the bytes from ``start`` to ``end`` have a part in broken ones."""
        before = bisect_left(self._starts, end)
        return before > 0 and self._ends[before - 1] > start

    def moved(self, end: int) -> int | None:
        """Return where a position is in the text; None within a broken part, or in one that is left out."""
        before = bisect_left(self._starts, end)
        if before and (self._ends[before - 1] > end or (self._cut and before == len(self._starts))):
            return None
        return end + self._longer[before]


def _chunks(ends: Sequence[int | None], common: Sequence[int]) -> list[int]:
    """Return the chunk in which each token ends; a token that ends within a broken part is in that of its successor."""
    chunks, following = [], len(common)
    for end in reversed(ends):
        following = following if end is None else bisect_left(common, end)
        chunks.append(following if following < len(common) else UNSCORED)
    return chunks[::-1]


def _without(chunks: Sequence[int], unscored: set[int]) -> list[int]:
    return [UNSCORED if chunk in unscored else chunk for chunk in chunks]
