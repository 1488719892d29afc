"""Streams of results from several worker processes, which survive the death of a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rlcore.controller.dispatch import partition, take
from rlcore.errors import WorkerError
from rlcore_ray.answers import PendingCall, Ref, read
from rlcore_ray.calls import Call, Response, unpacked
from rlcore_ray.role_workers import Role
from rlcore_ray.workers import Workers


@dataclass
class _OpenStream:
    """The stream of one process: ``indices`` of the items that it was given, and those still ``missing``."""

    call: PendingCall
    indices: list[int]
    missing: set[int]


def stream(
    workers: Workers, role: Role, name: str, work: Callable[..., Any], items: Sequence[Any], args: tuple[Any, ...]
) -> Iterator[tuple[list[int], Any]]:
    """Call ``work(engines, part, *args)`` in the processes of ``role`` and yield indices into ``items`` with results.

    If a process dies, its unanswered items are given to another one, or to the process that replaces it.

    Raises:
        WorkerError: a call failed, ended early, or gave no result in time.
    """
    open_: dict[Any, _OpenStream] = {}

    def start(rank: int, indices: list[int]) -> None:
        generator, call = _start(workers, role, rank, name, work, (take(items, indices), *args))
        open_[generator] = _OpenStream(call, indices, set(indices))

    ranks = workers.up_to_date(role.pool, role.name)
    for rank, indices in zip(ranks, partition(items, len(ranks))):
        if indices:
            start(rank, indices)
    while open_:
        ready, _ = ray.wait(list(open_), timeout=workers.waiter.timeout_s, fetch_local=False)
        if not ready:
            raise WorkerError(workers.waiter.late([(part.call.title, part.call.worker) for part in open_.values()]))
        for generator in ready:
            part = open_[generator]
            answer = _next(generator)
            if isinstance(answer, Exception):
                del open_[generator]
                workers.replace(part.call, answer)
                if part.missing:
                    ranks = workers.up_to_date(role.pool, role.name)
                    start(part.call.rank if part.call.rank in ranks else ranks[0], sorted(part.missing))
            elif answer is None:
                del open_[generator]
                if part.missing:
                    raise WorkerError(f"{part.call.title} ended with {len(part.missing)} items unanswered")
            else:
                yield _results(workers, part, *answer)


def _start(
    workers: Workers, role: Role, rank: int, name: str, work: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, PendingCall]:
    """Start a stream in one process; return Ray's generator, and the call for messages."""
    worker = role.pool.workers[rank]
    generator = worker.stream.remote(Call(name, work, args, {}, workers.label, workers.waiter.timeout_s))
    return generator, PendingCall(name, role.pool, rank, worker, generator, generator)


def _results(workers: Workers, part: _OpenStream, body: Ref, response: Response) -> tuple[list[int], Any]:
    if response.failure is not None:
        workers.waiter.fail(part.call.title, response.failure)
    answered, result = unpacked(response.value, body)
    indices = [part.indices[index] for index in answered]
    part.missing.difference_update(indices)
    if not part.missing:
        workers.waiter.add_event(response.event)
    return indices, result


def _next(generator: Any) -> tuple[Ref, Response] | Exception | None:
    """Return the next answer of a stream; None at its end, an exception if its worker is gone."""
    body = next(generator, None)
    if body is None:
        return None
    try:
        response = read(next(generator))
    except StopIteration:  # ``body`` is no body but the error of the worker's death
        gone = read(body)
        return gone if isinstance(gone, Exception) else None
    return response if isinstance(response, Exception) else (body, response)
