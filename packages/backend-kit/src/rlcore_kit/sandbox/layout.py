"""What of the host a sandbox shows, and how its processes are started."""

from __future__ import annotations

import json
import os
import random
import shutil
import site
import sys
from pathlib import Path

import rlcore_kit
from rlcore_kit.sandbox.programs.plan import Plan
from rlcore_kit.sandbox.settings import SandboxLimits

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
FILES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives", "/etc/mime.types")
KIT = Path(rlcore_kit.__file__).parent
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "USER": "sandbox",
    "LANG": "C.UTF-8",
    # a thread pool as large as the machine has cores would not fit into the limits
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
SMALLEST_RANGE = 1000


def plan_of(limits: SandboxLimits, report: int) -> Plan:
    """Return the plan of a sandbox with ``limits`` that writes its reports to the descriptor ``report``."""
    packages = [folder for folder in site.getsitepackages() if os.path.isdir(folder)] if limits.site_packages else []
    base = Path(sys.base_prefix)
    shown = [*SYSTEM, *FILES, *(str(base / name) for name in ("bin", "lib", "lib64")), str(KIT), *packages]
    links = [(path, os.readlink(path)) for path in SYSTEM if os.path.islink(path)]
    binds: list[str] = []
    for path in sorted(
        {os.path.abspath(path) for path in shown if os.path.exists(path)},
        key=lambda path: (len(Path(path).parts), path),
    ):
        covered = any(Path(path).is_relative_to(other) for other in binds)
        if not covered and path not in {link for link, _ in links}:
            binds.append(path)
    return Plan(
        binds=binds,
        links=links,
        packages=packages,
        uid=_unprivileged_id() if os.getuid() == 0 else None,
        report=report,
        memory_mb=limits.memory_mb,
        cpu_s=limits.cpu_s,
        processes=limits.processes,
        disk_mb=limits.disk_mb,
    )


def _unprivileged_id() -> int | None:
    """Return an id that no account has, different in each sandbox: the kernel counts processes per user.

    Root's processes are never counted. None where root is the only user there is (in a namespace of users).
    """
    ranges = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    start, _, count = max(ranges, key=lambda entry: entry[2])
    if count < SMALLEST_RANGE:
        return None
    return start + random.SystemRandom().randrange(count // 4, count // 2)


def _python(module: str, plan: Plan) -> list[str]:
    source = f"import sys; sys.path.append({str(KIT.parent)!r}); from rlcore_kit.sandbox.programs import {module}; "
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return [executable, "-I", "-c", f"{source}{module}.main()", json.dumps(plan)]


def with_namespaces(plan: Plan) -> list[str]:
    """Return the command of a sandbox that this package makes itself."""
    return _python("namespaces", plan)


def with_bwrap(plan: Plan) -> list[str]:
    """Return the command of a sandbox that bubblewrap makes."""
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    command += ["--as-pid-1", "--new-session"]
    if plan["uid"] is None:
        command += ["--unshare-user"]
    else:  # the supervisor becomes another user
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    for path in plan["binds"]:
        for parent in reversed(Path(path).parents[:-1]):  # which other users could not read by default
            command += ["--perms", "755", "--dir", str(parent)]
        command += ["--ro-bind", path, path]
    for link, target in plan["links"]:
        command += ["--symlink", target, link]
    size = str(plan["disk_mb"] << 20)
    command += ["--proc", "/proc", "--dev", "/dev"]
    for folder in ("/tmp", "/dev/shm"):
        command += ["--size", size, "--perms", "1777", "--tmpfs", folder]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", *_python("supervisor", plan)]
