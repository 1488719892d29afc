"""Calls to a worker process: `Call`, its `Response`, and how batches in both are passed by reference."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from rlcore.batch import Batch
from rlcore.controller.executor import Event
from rlcore.errors import RlcoreError, WorkerDied
from rlcore_kit.weight_transfer import WeightReceiver, WeightSender
from rlcore_ray.remote_batch import (
    FETCH_S,
    BatchMeta,
    ChunkRef,
    ColumnRef,
    RemoteBatch,
    bulk,
    materialize,
    metadata,
)

LOST = (ray.exceptions.ObjectLostError, ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError)


class Engines(dict[str, Any]):
    """The engines of a worker process by role, and its ends of a weight transfer, while one is open."""

    sender: WeightSender | None = None
    receiver: WeightReceiver | None = None


@dataclass(frozen=True)
class Call:
    """``work(engines, *args, **kwargs)`` in a worker process.

    Attributes:
        name: for errors and the timeline, such as "actor.train".
        work: picklable; its first argument are the `Engines` of the process.
        label: the part of the step that the call belongs to.
        timeout_s: timeout of waiting for batches among the arguments that are still being computed.
    """

    name: str
    work: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    timeout_s: float = FETCH_S


@dataclass(frozen=True)
class Failure:
    """An exception in a worker.

    Attributes:
        error: one line; ``trace`` is the complete traceback.
        error_type: what the controller raises: the exception's class if it is an `RlcoreError`; `WorkerDied` if an
            argument of the call is lost with the process or node that held it; None is `WorkerError`.
        engine_died: an engine of the worker has lost processes that it started.
    """

    error: str
    trace: str
    error_type: type[Exception] | None
    engine_died: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe ``error``, which was caught in a worker."""
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, RlcoreError):
            return cls(str(error), trace, type(error))
        if isinstance(error, WorkerDied):
            return cls(str(error), trace, WorkerDied, engine_died=True)
        kind = type(error).__name__
        return cls(f"{kind}: {error}", trace, WorkerDied if isinstance(error, LOST) else None)


@dataclass(frozen=True)
class Response:
    """The part of a result that the controller reads.

    Attributes:
        value: the result, with a `BatchRef` in the place of every batch; None after a failure.
    """

    event: Event
    value: Any = None
    failure: Failure | None = None


@dataclass(frozen=True)
class BatchRef:
    """A batch of a result: the batch ``slot`` of the body that came with the response."""

    slot: int
    meta: BatchMeta


def arguments(value: Any, timeout_s: float) -> Any:
    """Read every `RemoteBatch` in ``value``, also in lists and tuples."""
    if isinstance(value, RemoteBatch):
        return materialize(value, timeout_s)
    if type(value) in (list, tuple) and any(isinstance(item, RemoteBatch | list | tuple) for item in value):
        return type(value)(arguments(item, timeout_s) for item in value)
    return value


def arguments_of(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of ``call``, by position and by name, with all batches read."""
    named = {name: arguments(value, call.timeout_s) for name, value in call.kwargs.items()}
    return arguments(call.args, call.timeout_s), named


def packed(value: Any) -> tuple[Any, tuple[Batch, ...]]:
    """Divide a result into the value of a response, and the body: the batches that stay in the object store."""
    body: list[Batch] = []

    def pack(item: Any) -> Any:
        if isinstance(item, Batch):
            body.append(bulk(item))
            return BatchRef(len(body) - 1, metadata(item))
        if type(item) in (list, tuple):
            return type(item)(map(pack, item))
        return item

    return pack(value), tuple(body)


def unpacked(value: Any, body: ray.ObjectRef[Any]) -> Any:
    """Return the value of a response with every batch as a `RemoteBatch` over ``body``."""
    if isinstance(value, BatchRef):
        size = value.meta.size
        return value.meta.at(ColumnRef((ChunkRef(body, value.slot, size),), np.arange(size)))
    if type(value) in (list, tuple):
        return type(value)(unpacked(item, body) for item in value)
    return value


def answer(
    call: Call, engines: Engines, worker: str, finish: Callable[[Any], Any]
) -> tuple[Response, tuple[Batch, ...] | None]:
    """Execute ``call``; a failure becomes part of the response, so that it reaches the controller once.

    Args:
        finish: awaits a coroutine, and returns other results unchanged.
    """
    start = time.time()
    try:
        args, kwargs = arguments_of(call)
        start = time.time()  # waiting for results of other workers is not this worker's time
        value, body = packed(finish(call.work(engines, *args, **kwargs)))
    except Exception as error:
        return Response(Event(call.name, call.label, worker, start, time.time()), failure=Failure.of(error)), None
    return Response(Event(call.name, call.label, worker, start, time.time()), value), body


def cause_of_death(error: Exception) -> str:
    """Return the line of Ray's ``error`` that says why a worker is gone."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "died" in line.lower() or "node" in line.lower()]
    return (telling or lines or [type(error).__name__])[0]
