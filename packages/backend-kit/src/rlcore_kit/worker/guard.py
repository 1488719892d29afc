"""The guard process between the trainer and one worker, which ends everything that the worker started.

The guard forks the worker and never runs the user's code. It is the *subreaper* of all descendants of the worker
(prctl(2)), so that a process that changes its session or loses its parent is still its descendant. It kills all of them
when

- the worker ends, for whatever reason;
- the control pipe requests it, or is closed because the trainer died;
- a byte on the control pipe requests a check, and the descendants are too many or hold too much memory.

The worker dies with its guard (parent-death signal). Linux only. The guard of a Ray cluster (`rlcore_ray`) has another
mechanism: Ray's daemons are not descendants of a guard, so it finds them by a mark in their environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

# Exit codes of the guard; all others are those of the worker (128 + n: killed by signal n).
MEMORY = 250
PROCESSES = 251

# Bytes on the control pipe.
CHECK = b"c"
QUIT = b"q"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PAGE = os.sysconf("SC_PAGE_SIZE")


def serve_guarded(serve: Callable[[int, int], None]) -> NoReturn:
    """Run ``serve`` with the descriptors of requests and replies under a guard (`run_guarded`).

    This is the program of a worker process: the command line holds the arguments that
    `rlcore_kit.worker.process.WorkerProcess` passes.
    """
    requests, replies, control, owner, memory, processes = map(int, sys.argv[1:])
    for descriptor in (requests, replies, control):
        os.set_inheritable(descriptor, False)
    run_guarded(
        lambda: serve(requests, replies),
        pipes=(requests, replies),
        owner=owner,
        control=control,
        memory=memory,
        processes=processes,
    )


def run_guarded(
    work: Callable[[], None], *, pipes: tuple[int, ...], owner: int, control: int, memory: int, processes: int
) -> NoReturn:
    """Run ``work`` in a forked process, watch it, and exit with its exit code.

    Args:
        pipes: descriptors for the worker only.
        owner: process id of the trainer, the parent of this process.
        control: read end of the control pipe.
        memory: maximum bytes that the worker and its descendants hold together, and that each of them allocates.
        processes: maximum number of the worker and its descendants.
    """
    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    for number in (signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # a handler of any kind makes signals reach the pipe
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # The signal also arrives when the *thread* of the trainer that started this process ends: compare the parent's id.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        for descriptor in (wake, waker, control):
            os.close(descriptor)
        _become_worker(guard, memory)
        work()
        os._exit(0)
    for descriptor in pipes:
        os.close(descriptor)
    code = 1
    try:
        code = _watch(worker, owner=owner, control=control, wake=wake, memory=memory, processes=processes)
    finally:
        _kill_family(worker)
        os._exit(code)


def _become_worker(guard: int, memory: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # RLIMIT_DATA counts private writable memory. RLIMIT_AS would also count reserved memory, which numerical libraries
    # and threads reserve many times over; RLIMIT_RSS has no effect on Linux.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _watch(worker: int, *, owner: int, control: int, wake: int, memory: int, processes: int) -> int:
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if wake in ready:
            os.read(wake, 4096)
        status = _reap(worker)
        if status is not None:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        if os.getppid() != owner:
            return 0
        if control in ready:
            commands = os.read(control, 4096)
            if not commands or QUIT in commands:
                return 0
            family = list(_descendants(os.getpid()))
            if len(family) > processes:
                return PROCESSES
            if sum(map(_private_memory, family)) > memory:
                return MEMORY


def _reap(worker: int) -> int | None:
    """Collect ended children; return the worker's wait status if it is among them."""
    result = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                result = ended[1]
    return result


def _kill_family(worker: int) -> None:
    # The kernel signals a process group atomically: no fork in it escapes, which ends fork bombs.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)
    while family := list(_descendants(os.getpid())):
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
        _reap(worker)


def _descendants(pid: int) -> Iterator[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                children = [int(child) for child in file.read().split()]
        except OSError:  # the process has ended
            continue
        for child in children:
            yield child
            yield from _descendants(child)


def _private_memory(pid: int) -> int:
    """Return the resident bytes that are not file pages; pages shared after a fork count in each process."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:  # the process has ended
        return 0
    return (resident - shared) * _PAGE


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")
