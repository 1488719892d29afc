"""How a call on a worker group is spread over its workers, declared on the interface method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, TypeVar

from rlcore.batch import Batch, balanced_partitions
from rlcore.metrics import Metrics

F = TypeVar("F", bound=Callable[..., Any])


class Dispatch(Enum):
    """SHARD: divide the first argument over data-parallel ranks by tokens, gather results in order.
    BROADCAST: every worker gets the same arguments; worker 0 answers.
    RANK_ZERO: only worker 0 is called.
    STREAM: every worker yields; the caller iterates over worker 0's items.
    """

    SHARD = "shard"
    BROADCAST = "broadcast"
    RANK_ZERO = "rank_zero"
    STREAM = "stream"


def dispatch(how: Dispatch) -> Callable[[F], F]:
    """Declare how calls of an interface method are spread."""

    def mark(method: F) -> F:
        method.__dispatch__ = how  # type: ignore[attr-defined]
        return method

    return mark


def dispatch_of(interface: type, method: str) -> Dispatch | None:
    """The declaration on ``interface`` or the nearest base that has one; None for a plain attribute."""
    for base in interface.__mro__:
        how = getattr(base.__dict__.get(method), "__dispatch__", None)
        if how is not None:
            return Dispatch(how)
    return None


def partition(argument: Batch | Sequence[Any], parts: int) -> list[list[int]]:
    """Which samples each rank gets.

    Batches are balanced by tokens. Sequences of requests stay in runs of one ``group`` (so that a shared prompt is
    prefilled once), and the runs are balanced by their number of requests.
    """
    if isinstance(argument, Batch):
        return argument.partition(parts)
    runs: dict[Any, list[int]] = {}
    for index, item in enumerate(argument):
        group = getattr(item, "group", None)
        runs.setdefault(("alone", index) if group is None else group, []).append(index)
    members = list(runs.values())
    return [
        sorted(index for run in chosen for index in members[run])
        for chosen in balanced_partitions([len(run) for run in members], parts)
    ]


def take(argument: Batch | Sequence[Any], indices: Sequence[int]) -> Any:
    return argument.take(indices) if isinstance(argument, Batch) else [argument[index] for index in indices]


def gather(results: Sequence[Any], parts: Sequence[Sequence[int]]) -> Any:
    """Put the ranks' results back together, in the order of the samples."""
    if all(isinstance(result, Metrics) for result in results):
        return Metrics.merge(results)
    origin = [index for part in parts for index in part]
    order = sorted(range(len(origin)), key=origin.__getitem__)
    if all(isinstance(result, Batch) for result in results):
        return Batch.concat([result for result, part in zip(results, parts) if part]).take(order)
    joined = [item for result in results for item in result]
    return [joined[index] for index in order]
