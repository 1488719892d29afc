"""Run a function of a test on several processes, with the environment of ``torchrun``."""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from rlcore_kit.serving.ports import unused_port

# Importing torch takes minutes on a busy machine.
_START_S = 300


class RankPool:
    """Worker processes that live between calls, forked from one process that imports torch and ``preload`` once.

    Each worker has one thread, and ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` (a
    free port on loopback) in its environment. A process group that a function initialises exists in later calls too.
    """

    def __init__(self, world_size: int, preload: Sequence[str] = ()) -> None:
        self.world_size = world_size
        self._preload = ["torch", *preload]
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Call ``function(*args)`` on every rank and return the results by rank.

        Args:
            function: a module-level function, which may be in a test module; arguments and results are pickled.

        Raises:
            AssertionError: a rank raised (the message has its traceback), or did not return within ``timeout``
                seconds (all stacks are written to stderr). The processes are killed; the next call starts new ones.
        """
        if not self._ranks:
            self._start()
        job = (function.__code__.co_filename, function.__qualname__, args)
        for _, connection in self._ranks:
            connection.send(job)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world_size and time.monotonic() < deadline:
            waiting = {c: r for r, (_, c) in enumerate(self._ranks) if r not in results and r not in failures}
            ready = wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
            for connection in (connection for connection in waiting if connection in ready):
                try:
                    worked, value = connection.recv()
                except EOFError:
                    worked, value = False, "the process died"
                if worked:
                    results[waiting[connection]] = value
                else:
                    failures[waiting[connection]] = value
            if failures:  # the other ranks may wait for the failed rank forever
                deadline = min(deadline, time.monotonic() + 3)
        if failures or len(results) < self.world_size:
            hanging = [rank for rank in range(self.world_size) if rank not in results and rank not in failures]
            if not failures:
                for rank in hanging:
                    os.kill(self._ranks[rank][0].pid, signal.SIGUSR1)
                time.sleep(0.5)
            self.close()
            texts = [f"rank {rank} failed:\n{text}" for rank, text in sorted(failures.items())]
            if hanging:
                reason = "after another rank had failed" if failures else f"within {timeout:g} s"
                texts.append(f"ranks {hanging} of {self.world_size} did not return {reason}")
            raise AssertionError("\n".join(texts))
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes; idempotent."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self._preload)  # of the first pool of this process
        port = unused_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, port), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        for rank, (_, connection) in enumerate(self._ranks):
            assert connection.poll(_START_S), f"rank {rank} did not start within {_START_S} s"
            connection.recv()


def _serve(connection: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    import torch

    torch.set_num_threads(1)
    modules: dict[str, ModuleType] = {}
    connection.send("ready")
    while True:
        try:
            file, name, args = connection.recv()
        except EOFError:
            return
        try:
            if file not in modules:
                modules[file] = _load(file)
            connection.send((True, getattr(modules[file], name)(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _load(file: str) -> ModuleType:
    """Import the module of a file, which need not be importable by name (pytest's importlib mode)."""
    name = f"rlcore_ranks_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
