"""A process group of this process and a server's workers, for weights by broadcast.

The group has a store of its own and is registered nowhere: the default group belongs to the trainer. Its keys are those
under which `torch.distributed`'s own rendezvous (2.11 to 2.13) looks for them, as that is what the server calls.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from rlcore.errors import EngineError, WorkerError
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.threaded_calls import ThreadedCall

# torch.distributed exports these without declaring it.
c10d: Any = torch.distributed

_LOOK_S = 0.002
_LEAVE_S = 5.0


class UpdateGroup:
    """Rank 0 of a group whose others are the ``workers`` of the server behind ``connection``.

    Raises:
        EngineError: the server refuses to join.
        WorkerError: it is gone, or did not join in time.
    """

    def __init__(self, connection: Connection, backend: str, host: str, workers: int, timeout_s: float) -> None:
        self.name = f"rlcore-{secrets.token_hex(4)}"
        self._connection, self._backend, self._timeout_s = connection, backend, timeout_s
        # TCPStore by itself listens on every interface.
        with socket.create_server((host, 0)) as listener:
            port = listener.getsockname()[1]
            self._store: Any = c10d.TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout_s),
                master_listen_fd=listener.detach(),
            )
        self._group: Any = None
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": workers + 1,
            "group_name": self.name,
            "backend": backend,
        }
        answer = connection.submit(
            connection.request("POST", "/init_weights_update_group", "join the group for weights", body=body)
        )
        joining = ThreadedCall(f"join {self.name}", lambda: self._join(host, workers + 1))
        self._await(joining.done.is_set, answer, "join the group for weights")
        if joining.error is not None:
            answer.cancel()
            raise WorkerError(f"no group for weights with {connection.url} came about: {joining.error}")
        self._answered(answer, "join the group for weights")

    def _join(self, host: str, size: int) -> None:
        store = c10d.PrefixStore(f"{self.name}/", c10d.PrefixStore(self.name, self._store))
        limit = timedelta(seconds=self._timeout_s)
        if self._backend == "nccl":
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._group = c10d.ProcessGroupNCCL(c10d.PrefixStore("cuda/", store), 0, size, options)
            return
        settings = c10d.ProcessGroupGloo._Options()
        settings._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
        settings._timeout = limit
        # torch makes gloo groups for both devices out of one: the same object under the keys of the first
        self._group = c10d.ProcessGroupGloo(c10d.PrefixStore("cpu/", store), 0, size, settings)

    def broadcast(self, flat: torch.Tensor, taking: Future[Any], what: str) -> None:
        """Send ``flat`` to all workers, which take it while the server works at the request ``taking``.

        Raises:
            EngineError, WorkerError: the server answered instead of taking it, or did not take it in time.
        """
        options = c10d.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.asyncOp = True
        work = self._group.broadcast([flat], options)
        self._await(work.is_completed, taking, what)
        self._answered(taking, what)
        work.wait()

    def close(self) -> None:
        """Leave the group, and have the server do so; idempotent.

        What is left of a broadcast that the server does not take ends with the server's side, or with its time. It is
        waited for in a thread of its own, as gloo does so when a group is forgotten.
        """
        if self._group is None:
            return
        held = [self._group, self._store]
        self._group = self._store = None
        with contextlib.suppress(EngineError, WorkerError):  # it may be what failed
            self._connection.ask(
                "POST",
                "/destroy_weights_update_group",
                "leave the group for weights",
                body={"group_name": self.name},
                timeout_s=_LEAVE_S,
            )
        ThreadedCall(f"leave {self.name}", held.clear)

    def _await(self, done: Callable[[], bool], answer: Future[Any], what: str) -> None:
        """Wait until this side is done. A server that fails says so, and no collective is waited for any longer."""
        deadline = time.monotonic() + self._timeout_s
        while not done():
            if answer.done() and answer.exception() is not None:
                raise answer.exception() or AssertionError
            if time.monotonic() > deadline:
                answer.cancel()
                raise WorkerError(f"{self._connection.url} did not {what} within {self._timeout_s:g} s")
            time.sleep(_LOOK_S)

    def _answered(self, answer: Future[Any], what: str) -> None:
        try:
            answer.result(self._timeout_s)
        except TimeoutError:
            answer.cancel()
            raise WorkerError(f"{self._connection.url} did not {what} within {self._timeout_s:g} s") from None
