"""Process group of this process and a server's workers, for weights by broadcast.

Its store has the keys that the rendezvous of `torch.distributed` (2.11 to 2.13), which the server calls, looks for.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from rlcore.errors import EngineError, WorkerError
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.threaded_calls import ThreadedCall
from rlcore_kit.weight_transfer import process_group

_POLL_S = 0.002
_LEAVE_TIMEOUT_S = 5.0


class UpdateGroup:
    """Rank 0 of a process group whose other ranks are the ``workers`` of the server behind ``connection``.

    Args:
        backend: "gloo" or "nccl".
        host: address of this machine that the workers reach.
        timeout_s: timeout of joining and of each broadcast.

    Raises:
        EngineError: the server refuses to join.
        WorkerError: the server is gone, or did not join in time.
    """

    def __init__(self, connection: Connection, backend: str, host: str, workers: int, timeout_s: float) -> None:
        self.name = f"rlcore-{secrets.token_hex(4)}"
        self._connection, self._backend, self._timeout_s = connection, backend, timeout_s
        self._store, port = process_group.listening_store(host, timeout_s)
        self._process_group: Any = None
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": workers + 1,
            "group_name": self.name,
            "backend": backend,
        }
        what = "join the process group for weights"
        answer = connection.submit(connection.request("POST", "/init_weights_update_group", what, body=body))
        joining = ThreadedCall(f"join {self.name}", lambda: self._join(host, workers + 1))
        self._wait_until(joining.done.is_set, answer, what)
        if joining.error is not None:
            answer.cancel()
            raise WorkerError(f"cannot form a process group for weights with {connection.url}: {joining.error}")
        self._check_answer(answer, what)

    def _join(self, host: str, size: int) -> None:
        # torch makes gloo groups for both devices from one: the same object under the keys of the first
        device = "cuda" if self._backend == "nccl" else "cpu"
        store = process_group.prefixed(self._store, self.name, f"{self.name}/", f"{device}/")
        if self._backend == "nccl":
            self._process_group = process_group.nccl_group(store, 0, size, self._timeout_s)
        else:
            self._process_group = process_group.gloo_group(store, 0, size, host, self._timeout_s)

    def broadcast(self, flat: torch.Tensor, taking: Future[Any], what: str) -> None:
        """Send ``flat`` to all workers, which receive it while the server handles the request ``taking``.

        Raises:
            EngineError, WorkerError: the server refused, or did not take it in time.
        """
        work = process_group.broadcast(self._process_group, flat)
        self._wait_until(work.is_completed, taking, what)
        self._check_answer(taking, what)
        work.wait()

    def close(self) -> None:
        """Leave the process group, and have the server leave it; idempotent.

        A broadcast that the server did not take ends when the server leaves, or by its timeout. A separate thread waits
        for that: gloo does so when a process group is destroyed.
        """
        if self._process_group is None:
            return
        held = [self._process_group, self._store]
        self._process_group = self._store = None
        with contextlib.suppress(EngineError, WorkerError):  # the server may be what failed
            self._connection.ask(
                "POST",
                "/destroy_weights_update_group",
                "leave the process group for weights",
                body={"group_name": self.name},
                timeout_s=_LEAVE_TIMEOUT_S,
            )
        ThreadedCall(f"leave {self.name}", held.clear)

    def _wait_until(self, done: Callable[[], bool], answer: Future[Any], what: str) -> None:
        """Wait until this side is ``done``, or raise the server's failure as soon as it answers with one."""
        deadline = time.monotonic() + self._timeout_s
        while not done():
            if answer.done() and (error := answer.exception()) is not None:
                raise error
            if time.monotonic() > deadline:
                answer.cancel()
                raise WorkerError(f"{self._connection.url} did not {what} within {self._timeout_s:g} s")
            time.sleep(_POLL_S)

    def _check_answer(self, answer: Future[Any], what: str) -> None:
        try:
            answer.result(self._timeout_s)
        except TimeoutError:
            answer.cancel()
            raise WorkerError(f"{self._connection.url} did not {what} within {self._timeout_s:g} s") from None
