"""Dividing sequences among ranks and micro-batches by token count."""

import heapq
from collections.abc import Sequence

from rlcore.errors import BatchError


def balanced_partitions(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Spread sequences over ``parts`` ranks so that token counts are as even as possible.

    Longest first onto the least loaded rank (LPT, Graham 1969); ties go to the rank with fewer sequences, then to the
    lower rank, so the result is deterministic and no rank stays empty while there are at least ``parts`` sequences.

    Returns:
        ``parts`` lists of indices, each ascending; together they hold every index once.
    """
    if parts < 1:
        raise BatchError(f"cannot divide a batch into {parts} parts: at least 1 is needed")
    heap = [(0, 0, rank) for rank in range(parts)]
    result: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, count, rank = heapq.heappop(heap)
        result[rank].append(index)
        heapq.heappush(heap, (tokens + lengths[index], count + 1, rank))
    return [sorted(part) for part in result]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Pack sequences into micro-batches of at most ``max_tokens`` tokens each; a longer sequence stands alone.

    First-fit decreasing. A sequence is never divided.
    """
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        for slot, (used, members) in enumerate(bins):
            if used + length <= max_tokens:
                members.append(index)
                bins[slot] = (used + length, members)
                break
        else:
            bins.append((length, [index]))
    return [sorted(members) for _, members in bins]
