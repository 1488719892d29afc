"""Dispatch: how a call on the workers of a role is spread over them, declared on the interface method.

All executors use the functions below, so that a recipe gets the same results from each of them: `partition` the
samples, `take` each rank's part, call, `gather` the results.

A call may have fewer samples than there are ranks (or none). Ranks without samples are called with an *empty* batch or
list, because an engine's collectives need every rank; they return an empty result of the usual kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

from rlcore.batch import Batch, balanced_partitions
from rlcore.metrics import Metrics

F = TypeVar("F", bound=Callable[..., Any])


class Dispatch(Enum):
    """Ways to spread a call.

    Attributes:
        SHARD: divide the first argument (a `Batch` or a sequence) over data-parallel ranks by tokens, and gather the
            results: a `Batch` or list with one entry per sample in the order of the samples, `Metrics` that each rank
            recorded of its part (merged), or None.
        BROADCAST: every worker gets the same arguments; worker 0 answers.
        STREAM: every worker yields; the caller iterates over worker 0's items, to the end.
    """

    SHARD = "shard"
    BROADCAST = "broadcast"
    STREAM = "stream"


def dispatch(
    how: Dispatch, *, lazy: bool = False, together: Callable[..., str | None] | None = None
) -> Callable[[F], F]:
    """Declare how calls of an interface method are spread.

    Args:
        together: given the arguments of a SHARD call, names the column of unit ids whose samples stay on one rank
            (`Batch.partition`), or None.
        lazy: the caller need not wait if the engine is in another process. A SHARD method then returns a batch of
            per-token columns only, over the tokens that it was given, so that their lengths are known already; other
            methods return None. A failure is raised by a later call.
    """

    def mark(method: F) -> F:
        method.__dispatch__ = how  # type: ignore[attr-defined]
        method.__lazy__ = lazy  # type: ignore[attr-defined]
        method.__together__ = together  # type: ignore[attr-defined]
        return method

    return mark


def dispatch_of(interface: type, method: str) -> Dispatch | None:
    """Return the declaration on ``interface`` or the nearest base that has one; None for a plain attribute."""
    declared = _declared(interface, method)
    return None if declared is None else Dispatch(declared.__dispatch__)


def is_lazy(interface: type, method: str) -> bool:
    """Return whether the caller of ``method`` need not wait for it."""
    declared = _declared(interface, method)
    return declared is not None and bool(declared.__lazy__)


def partition_of_call(
    interface: type, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], argument: Any, parts: int
) -> list[list[int]]:
    """Return which samples of the divided ``argument`` of a SHARD call each rank gets (`partition`)."""
    named = getattr(_declared(interface, method), "__together__", None)
    return partition(argument, parts, None if named is None else named(*args, **kwargs))


def _declared(interface: type, method: str) -> Any:
    own = (base.__dict__.get(method) for base in interface.__mro__)
    return next((found for found in own if hasattr(found, "__dispatch__")), None)


def first_argument(
    method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Callable[[Any], Any]]:
    """Return the argument that SHARD divides, given by position or by name, and a function that calls with a part."""
    if args:
        return args[0], lambda part: method(part, *args[1:], **kwargs)
    name = next(iter(inspect.signature(method).parameters))
    if name not in kwargs:
        called = getattr(method, "func", method).__qualname__  # an interface's method is bound by `partial`
        raise TypeError(f"{called}() needs the argument {name!r}, which is divided over the ranks")
    return kwargs[name], lambda part: method(**{**kwargs, name: part})


def partition(argument: Batch | Sequence[Any], parts: int, together: str | None = None) -> list[list[int]]:
    """Return which samples each rank gets; parts may be empty.

    Batches are balanced by tokens, and units of the column ``together`` are not divided. Of a sequence of requests, the
    requests of one ``group`` stay together (so that a shared prompt is prefilled once), and the parts are balanced by
    their number of requests.
    """
    if not isinstance(argument, Sequence):  # a batch, or a reference to one
        return argument.partition(parts, together)
    groups = [getattr(item, "group", None) for item in argument]
    runs = [("alone", index) if group is None else group for index, group in enumerate(groups)]
    return balanced_partitions([1] * len(runs), parts, runs)


def take(argument: Batch | Sequence[Any], indices: Sequence[int]) -> Any:
    """Return the samples of ``argument`` at ``indices``."""
    return [argument[index] for index in indices] if isinstance(argument, Sequence) else argument.take(indices)


def gather(results: Sequence[Any], parts: Sequence[Sequence[int]]) -> Any:
    """Join the ranks' results, in the order of the samples.

    Raises:
        TypeError: results that `Dispatch.SHARD` cannot join.
        ValueError: a rank returned more or fewer entries than it got samples.
    """
    if all(result is None for result in results):
        return None
    if all(isinstance(result, Metrics) for result in results):
        return Metrics.merge(results)
    lists = all(isinstance(result, list) for result in results)
    if not lists and (not hasattr(results[0], "concat") or len(set(map(type, results))) > 1):
        kinds = ", ".join(type(result).__name__ for result in results)
        raise TypeError(f"SHARD joins Batch, list, Metrics or None from every rank; it got {kinds}")
    for rank, (result, part) in enumerate(zip(results, parts)):
        if len(result) != len(part):
            raise ValueError(f"data-parallel rank {rank} returned {len(result)} entries for {len(part)} samples")
    origin = [index for part in parts for index in part]
    order = sorted(range(len(origin)), key=origin.__getitem__)
    if not lists:  # batches, or references to batches
        # a rank without samples adds nothing, not even columns
        return results[0].concat([result for result in results if len(result)] or results[:1]).take(order)
    joined = [item for result in results for item in result]
    return [joined[index] for index in order]
