"""Dividing sequences among ranks and micro-batches by token count."""

import heapq
from bisect import bisect_right, insort
from collections.abc import Callable, Hashable, Sequence

from rlcore.errors import BatchError


def balanced_partitions(lengths: Sequence[int], parts: int, units: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Spread sequences over ``parts`` ranks so that token counts are as even as possible.

    Largest differencing (Karmarkar & Karp, 1982): the two most uneven partial divisions are merged, heavy parts with
    light ones, until one is left. Deterministic, and no rank stays empty while there are at least ``parts`` sequences:
    a merge puts sequences into empty parts first. On heavy-tailed lengths the fullest rank comes out a few tenths of a
    percent nearer to the mean than by longest-first greedy (LPT).

    Nearly all merges add one sequence to a division, which costs a search in its sorted parts; two divisions that fill
    all parts meet less often than once in ``parts`` sequences. So time grows with the sequences, hardly with ``parts``.

    Args:
        units: one id per sequence; sequences with the same id stay together on one rank. None: each is alone.

    Returns:
        ``parts`` lists of indices, each ascending; together they hold every index once.

    Raises:
        BatchError: ``parts`` is less than 1.
    """
    if parts < 1:
        raise BatchError(f"cannot divide a batch into {parts} parts: at least 1 is needed")
    if units is not None:
        return _whole_units(lengths, units, lambda sums: balanced_partitions(sums, parts))
    if parts == 1 or not lengths:
        return [list(range(len(lengths))), *([] for _ in range(parts - 1))]
    return _largest_differencing(lengths, parts)


def _largest_differencing(lengths: Sequence[int], parts: int) -> list[list[int]]:
    # a part: (tokens, number of sequences, first and last of them, between which `following` leads)
    following = [-1] * len(lengths)
    # a division: (-(heaviest - lightest), age, its parts from light to heavy, without the empty ones)
    divisions = [(-length, index, [(length, 1, index, index)]) for index, length in enumerate(lengths)]
    heapq.heapify(divisions)
    while len(divisions) > 1:
        _, _, large = heapq.heappop(divisions)
        _, age, small = divisions[0]
        if len(large) < len(small):
            large, small = small, large
        # with heavy on light, these many of the lightest parts meet; all others meet an empty one
        meeting = max(0, len(large) + len(small) - parts)
        moved = small[meeting:]
        for (a, n, first, last), (b, m, other_first, other_last) in zip(large[:meeting], reversed(small[:meeting])):
            following[last] = other_first
            moved.append((a + b, n + m, first, other_last))
        del large[:meeting]
        if len(moved) < 16:
            for part in moved:
                insort(large, part)
        else:
            large += moved
            large.sort()
        lightest = large[0][0] if len(large) == parts else 0
        heapq.heapreplace(divisions, (lightest - large[-1][0], age, large))
    filled = [_chain(first, following) for _, _, first, _ in reversed(divisions[0][2])]
    return filled + [[] for _ in range(parts - len(filled))]


def _chain(index: int, following: Sequence[int]) -> list[int]:
    """``index`` and all that follow it, ascending."""
    members = []
    while index >= 0:
        members.append(index)
        index = following[index]
    return sorted(members)


def micro_batches(lengths: Sequence[int], max_tokens: int, units: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Pack sequences (or units) into micro-batches of at most ``max_tokens`` tokens each; a longer one stands alone.

    Best-fit decreasing, which needs at most 11/9 of the fewest possible bins (+ 1; Johnson et al., 1974) and, over
    bins sorted by what they hold, little more time than sorting. A sequence is never divided.

    Args:
        units: one id per sequence; sequences with the same id stay in one micro-batch. None: each is alone.

    Returns:
        lists of indices, each ascending; the micro-batches that hold the longest sequences come first.

    Raises:
        BatchError: ``max_tokens`` is less than 1.
    """
    if max_tokens < 1:
        raise BatchError(f"a micro-batch of {max_tokens} tokens holds nothing: at least 1 is needed")
    if units is not None:
        return _whole_units(lengths, units, lambda sums: micro_batches(sums, max_tokens))
    bins: list[list[int]] = []
    fill: list[tuple[int, int]] = []  # (tokens, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = bisect_right(fill, (max_tokens - length, len(bins)))
        if fitting:
            tokens, chosen = fill.pop(fitting - 1)
            bins[chosen].append(index)
        else:
            tokens, chosen = 0, len(bins)
            bins.append([index])
        insort(fill, (tokens + length, chosen))
    return [sorted(members) for members in bins]


def _whole_units(
    lengths: Sequence[int], units: Sequence[Hashable], divide: Callable[[list[int]], list[list[int]]]
) -> list[list[int]]:
    """``divide`` units, each as long as its sequences together, and return the sequences of every part."""
    members: dict[Hashable, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit, []).append(index)
    whole = list(members.values())
    divided = divide([sum(lengths[index] for index in unit) for unit in whole])
    return [sorted(index for unit in part for index in whole[unit]) for part in divided]
