"""`Ranks` keeps processes that run the same controller program in step.

After each call every rank posts its status in the store of the process group and waits for the statuses of the others.
Results are exchanged only when all ranks succeeded, over a separate gloo process group (also if the engines use NCCL).
So a failure on one rank is raised on all, with its traceback, even by ranks that were still busy when it happened or
whose peers have ended. The exception is a rank that waits for the failed rank *inside* the engine: after a grace period
the failed rank raises alone, and the end of its process breaks the connections on which the other rank waits.
"""

from __future__ import annotations

import pickle
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    PrefixStore,
    _get_default_store,  # no public name gives the group's own store
)

from rlcore.errors import RlcoreError, WorkerError


@dataclass(frozen=True)
class Status:
    """Outcome of a call on one rank.

    Attributes:
        call: name of the call; the same on all ranks that are in step.
        nbytes: size of the pickled result.
        failed_at: seconds since the epoch; None if the call succeeded.
        error: one line; ``trace`` is the complete traceback.
        error_type: the exception's class if it is an `RlcoreError`.
    """

    call: str
    nbytes: int = 0
    failed_at: float | None = None
    error: str = ""
    trace: str = ""
    error_type: type[RlcoreError] | None = None


class Ranks:
    """All ranks of the default process group. Every rank makes the same calls in the same order.

    Args:
        timeout_s: how long a rank that is done waits for the others.
        grace_s: how long a rank that failed waits for the others.
    """

    def __init__(self, timeout_s: float, grace_s: float) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._timeout = timedelta(seconds=timeout_s)
        self._grace = timedelta(seconds=grace_s)
        self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        session = [uuid.uuid4().hex]  # a store may outlive its process group; keys must not
        dist.broadcast_object_list(session, src=0, group=self._group)
        # a clone has a separate connection: waiting on it does not block other users of the store
        store: Any = _get_default_store()  # Any: torch's stubs know neither clone nor values of bytes
        self._store: Any = PrefixStore(f"rlcore/{session[0]}", store.clone())
        self._calls = 0

    def gather_from_all(self, call: str, work: Callable[[], Any]) -> list[Any]:
        """Call ``work`` on every rank and return all results, by rank, on every rank."""
        payload, sizes = self._run(call, lambda: pickle.dumps(work(), protocol=5))
        sent = _as_tensor(payload.ljust(max(sizes)))
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self._group)
        return [pickle.loads(tensor[:size].numpy().data) for tensor, size in zip(received, sizes)]

    def broadcast_from_rank0(self, call: str, work: Callable[[], Any], everywhere: bool = True) -> Any:
        """Call ``work`` on every rank, or on rank 0 only, and return rank 0's result on every rank."""

        def answer() -> bytes:
            result = work() if everywhere or self.rank == 0 else None
            return pickle.dumps(result, protocol=5) if self.rank == 0 else b""

        payload, sizes = self._run(call, answer)
        buffer = _as_tensor(payload) if self.rank == 0 else torch.empty(sizes[0], dtype=torch.uint8)
        dist.broadcast(buffer, src=0, group=self._group)
        return pickle.loads(buffer.numpy().data)

    def close(self) -> None:
        """Destroy the process group; the ranks need not call this at the same time."""
        dist.destroy_process_group(self._group)
        del self._group  # the last reference: its threads end here

    def _run(self, call: str, work: Callable[[], bytes]) -> tuple[bytes, list[int]]:
        """Call ``work`` and wait until all ranks are done; return this rank's bytes and the sizes of all ranks.

        Raises:
            RlcoreError: the first failure on any rank, if it is an `RlcoreError`.
            WorkerError: any other failure, ranks that are out of step, or no answer from a rank in time.
        """
        number, payload, failure = self._calls, b"", None
        self._calls += 1
        try:
            payload = work()
            status = Status(call, len(payload))
        except Exception as error:
            failure = error
            status = _failed(call, error)
        keys = [f"{number}/{rank}" for rank in range(self.size)]
        try:
            self._store.set(keys[self.rank], pickle.dumps(status))
            timeout = self._timeout if failure is None else self._grace
            missing = self._wait(keys, timeout)
            if not missing:
                statuses = [pickle.loads(data) for data in self._store.multi_get(keys)]
                if number:  # all ranks have read the statuses of the call before
                    self._store.delete_key(f"{number - 1}/{self.rank}")
        except RuntimeError as error:
            lost = f"{call}: lost the connection to rank 0, whose store all ranks use; see the output of rank 0"
            raise WorkerError(lost) from failure or error
        if missing:
            late = f"{call}: no answer from rank {_listed(missing)} within {timeout.total_seconds():g} s"
            if failure is None:
                raise WorkerError(late)
            _raise(self.rank, self.rank, status, failure, note=f" ({late}; these ranks stop when this process ends)")
        failures = [(s.failed_at, rank) for rank, s in enumerate(statuses) if s.failed_at is not None]
        if failures:
            _, rank = min(failures)
            _raise(rank, self.rank, statuses[rank], failure)
        if len({s.call for s in statuses}) > 1:
            where = ", ".join(f"rank {rank} in {s.call}" for rank, s in enumerate(statuses))
            raise WorkerError(f"the ranks are out of step: {where}; all ranks must make the same calls in one order")
        return payload, [s.nbytes for s in statuses]

    def _wait(self, keys: Sequence[str], timeout: timedelta) -> list[int]:
        """Wait for ``keys`` (one per rank) and return the ranks whose keys are still missing after ``timeout``."""
        try:
            self._store.wait(list(keys), timeout)
        except RuntimeError:
            return [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        return []


def _failed(call: str, error: Exception) -> Status:
    return Status(
        call,
        failed_at=time.time(),
        error=str(error) if isinstance(error, RlcoreError) else f"{type(error).__name__}: {error}",
        trace="".join(traceback.format_exception(error)),
        error_type=type(error) if isinstance(error, RlcoreError) else None,
    )


def _raise(rank: int, here: int, status: Status, own: Exception | None, note: str = "") -> NoReturn:
    """Raise the failure that ``rank`` posted; on ``rank`` itself the chain of exceptions has the traceback already."""
    message = f"{status.call} failed on rank {rank}: {status.error}{note}"
    if status.error_type is not None:
        raise status.error_type(message) from own
    raise WorkerError(message if rank == here else f"{message}\n\n{status.trace.rstrip()}") from own


def _as_tensor(payload: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
