"""`Worker`: a worker process, with the engines of all roles on its pool."""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray

from rlcore.batch import Batch
from rlcore.controller.executor import Event
from rlcore_ray.calls import Call, Engines, Failure, Response, answer, arguments_of, packed
from rlcore_ray.capacity import alive_nodes

CONCURRENCY_GROUPS = {"engine": 1, "control": 4, "sample": 256}
"""Maximum concurrent calls of each kind: calls of engines run one after another (collectives need one order), short
interventions (weights, pause, abort) and requests run at the same time as these."""

PARENT_S = 1.0
"""Interval between checks of the parent process."""


@dataclass(frozen=True)
class WorkerLocation:
    """Where a worker process runs."""

    host: str
    node_id: str
    pid: int
    gpus: tuple[str, ...]
    log: str


class Worker:
    """One process of a pool.

    Args:
        name: such as "train[3]".
        log: file for stdout and stderr; None does not redirect them.
    """

    def __init__(self, name: str, log: str | None) -> None:
        self._name = name
        self._log = log
        self._engines = Engines()
        self._listener: socket.socket | None = None
        self._store: Any = None
        self._replica = True
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = threading.Lock()
        if log is not None:
            _redirect_output(Path(log))
        faulthandler.enable()
        threading.Thread(target=_end_with, args=(os.getppid(),), name="raylet-watch", daemon=True).start()

    @ray.method(concurrency_group="control")
    def location(self) -> WorkerLocation:
        """Return where this process runs."""
        context = ray.get_runtime_context()
        gpus = tuple(map(str, context.get_accelerator_ids().get("GPU", [])))
        return WorkerLocation(_host(), context.get_node_id(), os.getpid(), gpus, self._log or "")

    @ray.method(concurrency_group="engine")
    def listen(self, host: str) -> int:
        """Return a free port on ``host`` for the pool's rendezvous; the socket stays open, so the port stays taken."""
        self._listener = socket.create_server((host, 0))
        return int(self._listener.getsockname()[1])

    @ray.method(concurrency_group="engine")
    def join(self, rank: int, world: int, host: str, port: int, timeout_s: float) -> None:
        """Join the other processes of the pool in the default process group, as under ``torchrun``."""
        import torch
        from torch import distributed as dist

        self._replica = False
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": "0",  # Ray shows each process only its own GPUs
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }
        if world == 1:
            return
        interface = interface_of(_host())
        if interface is not None:  # gloo and NCCL would choose by host name, or the first interface that is up
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        timeout = timedelta(seconds=timeout_s)
        self._store = dist.TCPStore(  # type: ignore[attr-defined]  # torch's stubs lack it
            host,
            port,
            world,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=self._listener.detach() if self._listener is not None else None,
        )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=world, timeout=timeout)

    @ray.method(concurrency_group="engine", num_returns=2)
    def engine(self, call: Call) -> tuple[Response, tuple[Batch, ...] | None]:
        """Execute ``call``; such calls run one after another."""
        return self._answer(call)

    @ray.method(concurrency_group="control", num_returns=2)
    def control(self, call: Call) -> tuple[Response, tuple[Batch, ...] | None]:
        """Execute ``call`` while calls of engines may be running."""
        return self._answer(call)

    @ray.method(concurrency_group="sample", num_returns=2)
    def sample(self, call: Call) -> tuple[Response, tuple[Batch, ...] | None]:
        """Execute ``call``, one of many that run at the same time."""
        return self._answer(call)

    @ray.method(concurrency_group="sample", num_returns="streaming")
    def stream(self, call: Call) -> Iterator[Any]:
        """Yield, for each item that ``call.work`` yields, the batches and then the response; a failure comes last."""
        start = time.time()

        def event() -> Event:
            return Event(call.name, call.label, self._name, start, time.time())

        try:
            args, kwargs = arguments_of(call)
            start = time.time()
            for item in call.work(self._engines, *args, **kwargs):
                value, body = packed(item)
                yield body
                yield Response(event(), value)
        except Exception as error:
            failure = Failure.of(error)
            self._exit_with_engine(failure)
            yield None
            yield Response(event(), failure=failure)

    @ray.method(concurrency_group="control")
    def stacks(self) -> str:
        """Return the stacks of all threads, for messages about calls that do not end."""
        import traceback

        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return "\n".join(
            f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in frames.items()
        )

    def _answer(self, call: Call) -> tuple[Response, tuple[Batch, ...] | None]:
        answered = answer(call, self._engines, self._name, self._finish)
        self._exit_with_engine(answered[0].failure)
        return answered

    def _exit_with_engine(self, failure: Failure | None) -> None:
        """End this process if its engine lost processes and this is a replica, which is then replaced with its engines.

        A process that trains reports the failure instead, which ends the run; it restarts from its checkpoint.
        """
        if failure is not None and failure.engine_died and self._replica:
            print(failure.trace, file=sys.stderr, flush=True)
            os._exit(1)

    def _finish(self, result: Any) -> Any:
        """Await ``result`` if it is a coroutine; the coroutines of all calls share one event loop."""
        if not inspect.iscoroutine(result):
            return result
        with self._loop_lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="requests", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(result, self._loop).result()


RemoteWorker: Any = ray.remote(concurrency_groups=CONCURRENCY_GROUPS, max_restarts=0)(Worker)  # type: ignore[call-overload]


def _end_with(raylet: int) -> None:
    """End this process when the node's daemon, its parent, is gone.

    Ray (2.60) checks that itself, but only for process 1 as the new parent; under a subreaper, such as the manager of a
    systemd session, an idle worker would keep running.
    """
    while os.getppid() == raylet:
        time.sleep(PARENT_S)
    os._exit(1)


def _host() -> str:
    """Return this node's address in the cluster."""
    node = ray.get_runtime_context().get_node_id()
    return next(str(known["NodeManagerAddress"]) for known in alive_nodes() if known["NodeID"] == node)


def interface_of(address: str) -> str | None:
    """Return the network interface of ``address`` (of 127.0.0.1 for loopback addresses); None if there is none."""
    import psutil  # comes with Ray

    wanted = "127.0.0.1" if address.startswith("127.") or address == "localhost" else address
    return next(
        (name for name, own in psutil.net_if_addrs().items() if any(one.address == wanted for one in own)), None
    )


def _redirect_output(log: Path) -> None:
    """Append the output of this process and its children to ``log``, instead of Ray's files outside the run folder."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
