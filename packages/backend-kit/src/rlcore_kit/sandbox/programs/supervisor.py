"""Process 1 of a sandbox: gives up its privileges, starts the worker, and ends with it, or when the host lets go.

The host holds the other end of standard input. When that is closed, or the host dies, process 1 ends, and the kernel
kills every other process of the sandbox.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress

from rlcore_kit.sandbox.programs import kernel, worker
from rlcore_kit.sandbox.programs.plan import Plan, read_plan

TICK_MS = 100
OPEN_FILES = 256


def main() -> None:
    """Run the plan in the arguments, as process 1 of namespaces that bwrap has made."""
    supervise(read_plan(sys.argv[1]))


def supervise(plan: Plan) -> None:
    """Run the worker to its end; does not return."""
    if plan["uid"] is not None:
        os.setgroups([])
        os.setgid(plan["uid"])
        os.setuid(plan["uid"])
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # changing the user clears it
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.drop_capabilities()
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # the kernel kills the sandbox before the trainer
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # processes of the same user cannot look into this one
    child = os.fork()
    if child == 0:
        _limit(plan)
        worker.serve(plan)
    os.close(1)
    os.close(2)
    why, status = _watch(child, plan["memory_mb"] << 20)
    os.write(plan["report"], json.dumps({"exit": status, "why": why}).encode() + b"\n")
    os._exit(0)


def _limit(plan: Plan) -> None:
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    limits = {
        resource.RLIMIT_AS: plan["memory_mb"] << 20,
        resource.RLIMIT_NPROC: plan["processes"] + 2,  # the supervisor, and the outermost process
        resource.RLIMIT_FSIZE: plan["disk_mb"] << 20,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (plan["cpu_s"], plan["cpu_s"] + 1))  # the first has a signal of that name
    kernel.filter_system_calls()


def _watch(child: int, memory: int) -> tuple[str, int]:
    """Wait until the worker ends, or a reason to end it; return that reason ("" if it ended) and its exit status."""
    poll = select.poll()
    poll.register(0, 0)  # the hang-up alone: what the host writes is the worker's
    poll.register(os.pidfd_open(child), select.POLLIN)
    while True:
        if any(descriptor == 0 for descriptor, _ in poll.poll(TICK_MS)):
            os._exit(0)
        for ended, status in _reaped():
            if ended == child:
                return "", os.waitstatus_to_exitcode(status)
        if _resident_bytes() > memory:
            return "memory", -signal.SIGKILL


def _reaped() -> Iterator[tuple[int, int]]:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended


def _resident_bytes() -> int:
    """Return the memory of all processes; what several of them share counts for each."""
    pages = 0
    with suppress(OSError):  # no /proc, where each process has its limit alone
        for name in os.listdir("/proc"):
            if name.isdigit() and name != "1":
                with suppress(OSError), open(f"/proc/{name}/statm") as file:
                    pages += int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
