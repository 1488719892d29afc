"""Which way to make a sandbox works on this machine, found by trying."""

from __future__ import annotations

import sys
from functools import cache

from rlcore_kit.sandbox.layout import with_bwrap, with_namespaces
from rlcore_kit.sandbox.session import Sandbox, SandboxError, Way
from rlcore_kit.sandbox.settings import SandboxLimits

WAYS: dict[str, Way] = {"bwrap": with_bwrap, "namespaces": with_namespaces}
PROBE = """
import os, socket
assert os.getppid() == 1, "its processes are visible outside"
assert [name for _, name in socket.if_nameindex()] in ([], ["lo"]), "it has a network"
try:
    for _ in range(8):
        if os.fork() == 0:
            import time
            time.sleep(60)
except BlockingIOError:
    pass
else:
    raise AssertionError("the number of its processes is not limited")
"""
REMEDY = (
    "install bubblewrap (apt-get install bubblewrap), or allow user namespaces: on a machine sysctl "
    "kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0, in a container "
    "--cap-add SYS_ADMIN and --security-opt seccomp=unconfined"
)


def fault(way: str) -> str:
    """Return why sandboxes cannot be made in this ``way``; "" if they can."""
    if sys.platform != "linux":
        return "it needs Linux"
    try:
        with Sandbox(SandboxLimits(processes=4, site_packages=False), WAYS[way]) as sandbox:
            result = sandbox.run_code(PROBE)
    except SandboxError as error:
        return str(error)
    said = result.stderr.strip().splitlines()
    return "" if result.ok else f"a trial failed: {said[-1] if said else result.ended}"


@cache
def working_way() -> str:
    """Return the first of `WAYS` that works; a process tries once.

    Raises:
        SandboxError: none works. There is no other way to run code.
    """
    faults = {}
    for way in WAYS:
        faults[way] = fault(way)
        if not faults[way]:
            return way
    tried = "; ".join(f"{way}: {reason}" for way, reason in faults.items())
    raise SandboxError(f"model-written code runs in a sandbox only, and this machine allows none ({tried}); {REMEDY}")


def open_sandbox(limits: SandboxLimits | None = None) -> Sandbox:
    """Start a sandbox.

    Raises:
        SandboxError: this machine allows none, or it did not start.
    """
    return Sandbox(limits or SandboxLimits(), WAYS[working_way()])
