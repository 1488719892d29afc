"""Rows of a micro-batch laid out so that what they have in common is computed once.

Rows that begin with the same tokens, as the completions of a prompt or the branches of a conversation do, have the
same states there. Rows are sorted by their tokens, so that each one shares as much with the row before it as with any
earlier one, and only the rest of it, its *run*, is laid out:

    rows     a b c d     a b c e f     a b g         (prefixes: 0, 3 and 2 tokens)
    layout   a b c d | e f | g                       a run attends to its prefix, slices of earlier runs, and to itself

A row's tokens are then found at `SharedRows.places`; outputs, losses and gradients do not notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

SHORTEST = 16
"""Tokens from which on a common prefix is shared: below, an additional attention call costs more than it saves."""


@dataclass(frozen=True)
class SharedRows:
    """The layout of rows whose flat tokens are ``[T]``, as D distinct tokens.

    Attributes:
        tokens: ``[D]`` int64, which of the T tokens is laid out at each place.
        places: ``[T]`` int64, the place of each token of the rows.
        runs: number of tokens of each run, all positive.
        first: number of tokens before each run in its row.
        prefixes: of each run, the slices of the layout that are before it in its row, in order.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    runs: tuple[int, ...]
    first: tuple[int, ...]
    prefixes: tuple[tuple[tuple[int, int], ...], ...]


def share_prefixes(tokens: torch.Tensor, lengths: Sequence[int]) -> SharedRows | None:
    """Lay out rows with flat ``tokens`` ``[T]`` int64 on the CPU; None if no two rows have a prefix in common."""
    rows = _rows(tokens, lengths)
    ends = np.cumsum(lengths)
    places = np.empty(len(tokens), np.int64)
    order, common = sorted_rows(rows)
    if not any(common):
        return None
    laid, runs, first, prefixes = list[np.ndarray](), list[int](), list[int](), list[tuple[tuple[int, int], ...]]()
    path: list[tuple[int, int]] = []  # slices of the layout that make up the row before
    total = 0
    for row, shared in zip(order, common):
        path = _cut(path, shared)
        prefix, run, end = tuple(path), len(rows[row]) - shared, ends[row]
        if run:
            laid.append(np.arange(end - run, end))
            runs.append(run)
            first.append(shared)
            prefixes.append(prefix)
            path.append((total, total + run))
            total += run
        if path:
            places[end - len(rows[row]) : end] = np.concatenate([np.arange(*piece) for piece in path])
    return SharedRows(
        torch.from_numpy(np.concatenate(laid)), torch.from_numpy(places), tuple(runs), tuple(first), tuple(prefixes)
    )


def divide_families(tokens: torch.Tensor, lengths: Sequence[int], max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Divide rows into families, which have a prefix in common, of at most ``max_tokens`` distinct tokens.

    A family with more is divided further; each of its parts then computes what they have in common.

    Returns:
        the rows of each family, and its number of distinct tokens.
    """
    rows = _rows(tokens, lengths)
    families, sizes = list[list[int]](), list[int]()
    for row, shared in zip(*sorted_rows(rows)):
        length = len(rows[row])
        if shared and sizes[-1] + length - shared <= max_tokens:
            families[-1].append(row)
            sizes[-1] += length - shared
        else:
            families.append([row])
            sizes.append(length)
    return families, sizes


def sorted_rows(rows: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Return the rows in the order of their tokens, and how many tokens each shares with the one before it."""
    order = sorted(range(len(rows)), key=[row.astype(">i8").tobytes() for row in rows].__getitem__)
    common = [0]
    for before, row in pairwise(order):
        shared = _common(rows[before], rows[row])
        common.append(shared if shared >= SHORTEST else 0)
    return order, common[: len(order)]


def _rows(tokens: torch.Tensor, lengths: Sequence[int]) -> list[np.ndarray]:
    return [row.numpy() for row in tokens.split(list(lengths))]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return the number of tokens with which both rows begin."""
    shortest = min(len(a), len(b))
    different = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(different[0]) if len(different) else shortest


def _cut(path: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Return the first ``length`` tokens of ``path``."""
    kept = []
    for start, stop in path:
        if length <= 0:
            break
        kept.append((start, min(stop, start + length)))
        length -= stop - start
    return kept
