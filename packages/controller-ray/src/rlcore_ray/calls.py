"""What the controller asks of a worker process, and what comes back."""

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
from rlcore_ray.remote_batch import (
    FETCH_S,
    Outline,
    Piece,
    RemoteBatch,
    Source,
    bulk,
    materialize,
    outline,
)

LOST = (ray.exceptions.ObjectLostError, ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError)


@dataclass(frozen=True)
class Call:
    """``work(engines, *args, **kwargs)`` in a worker process.

    Attributes:
        name: for errors and the timeline, such as "actor.train".
        work: picklable; is given the process's engines by role.
        label: the part of the step that the call belongs to.
        timeout_s: longest wait for batches among the arguments that are still being made.
    """

    name: str
    work: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    timeout_s: float = FETCH_S


@dataclass(frozen=True)
class Failure:
    """What went wrong in a worker.

    Attributes:
        error: one line; ``trace`` the whole traceback.
        error_type: what to raise in the controller, if not `WorkerError`: the exception's class if it is one of ours;
            `WorkerDied` if what the call was given is lost with the process or node that held it.
        engine_died: an engine of the worker's has lost processes of its own.
    """

    error: str
    trace: str
    error_type: type[Exception] | None
    engine_died: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, RlcoreError):
            return cls(str(error), trace, type(error))
        if isinstance(error, WorkerDied):
            return cls(str(error), trace, WorkerDied, engine_died=True)
        kind = type(error).__name__
        return cls(f"{kind}: {error}", trace, WorkerDied if isinstance(error, LOST) else None)


@dataclass(frozen=True)
class Head:
    """The part of an answer that the controller reads.

    Attributes:
        value: the result, with a `Stored` in the place of every batch; None after a failure.
    """

    event: Event
    value: Any = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Stored:
    """A batch of a result: number ``slot`` of what came with the head."""

    slot: int
    outline: Outline


def arguments(value: Any, timeout_s: float) -> Any:
    """``value`` as a worker gets it: every `RemoteBatch` in it, also in lists and tuples, is read."""
    if isinstance(value, RemoteBatch):
        return materialize(value, timeout_s)
    if type(value) in (list, tuple) and any(isinstance(item, RemoteBatch | list | tuple) for item in value):
        return type(value)(arguments(item, timeout_s) for item in value)
    return value


def given(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments, by position and by name."""
    named = {name: arguments(value, call.timeout_s) for name, value in call.kwargs.items()}
    return arguments(call.args, call.timeout_s), named


def packed(value: Any) -> tuple[Any, tuple[Batch, ...]]:
    """A result as a head's value, and the batches that stay in the object store."""
    stored: list[Batch] = []

    def pack(item: Any) -> Any:
        if isinstance(item, Batch):
            stored.append(bulk(item))
            return Stored(len(stored) - 1, outline(item))
        if type(item) in (list, tuple):
            return type(item)(map(pack, item))
        return item

    return pack(value), tuple(stored)


def unpacked(value: Any, body: ray.ObjectRef[Any]) -> Any:
    """A head's value with every batch as a `RemoteBatch` over ``body``."""
    if isinstance(value, Stored):
        size = value.outline.size
        return value.outline.at(Source((Piece(body, value.slot, size),), np.arange(size)))
    if type(value) in (list, tuple):
        return type(value)(unpacked(item, body) for item in value)
    return value


def answer(
    call: Call, engines: dict[str, Any], worker: str, finish: Callable[[Any], Any]
) -> tuple[Head, tuple[Batch, ...] | None]:
    """Do what ``call`` says; failures become part of the answer, so that they reach the controller once.

    Args:
        finish: awaits a coroutine, and returns other results as they are.
    """
    start = time.time()
    try:
        args, kwargs = given(call)
        start = time.time()  # waiting for what others are making is not this worker's time
        value, body = packed(finish(call.work(engines, *args, **kwargs)))
    except Exception as error:
        return Head(Event(call.name, call.label, worker, start, time.time()), failure=Failure.of(error)), None
    return Head(Event(call.name, call.label, worker, start, time.time()), value), body
