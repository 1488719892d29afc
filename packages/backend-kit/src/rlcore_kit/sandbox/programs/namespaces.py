"""The outermost process of a sandbox that is made without bwrap: moves to new namespaces with a new root.

Its child is process 1 of the sandbox. All processes of the sandbox are killed by the kernel when process 1 ends.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from rlcore_kit.sandbox.programs import kernel, supervisor
from rlcore_kit.sandbox.programs.plan import Plan, read_plan

OLD = "/old"
DEVICES = ("null", "zero", "full", "random", "urandom")


def main() -> None:
    """Run the plan in the arguments."""
    plan = read_plan(sys.argv[1])
    _unshare(with_users=plan["uid"] is None)
    child = os.fork()
    if child == 0:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)
        _make_root(plan)
        supervisor.supervise(plan)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)


def _unshare(with_users: bool) -> None:
    """Enter new namespaces; a user without privileges needs a namespace of users around them."""
    uid, gid = os.getuid(), os.getgid()
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    kernel.unshare(flags | kernel.CLONE_NEWCGROUP | (kernel.CLONE_NEWUSER if with_users else 0))
    if with_users:
        with suppress(FileNotFoundError):
            Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _make_root(plan: Plan) -> None:
    """Mount a new root with what the plan binds, and detach the host's."""
    safe = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("root", "/tmp", "tmpfs", safe, "size=1m,mode=755")
    os.mkdir(f"/tmp{OLD}")
    kernel.pivot_root("/tmp", f"/tmp{OLD}")
    os.chdir("/")
    for path in plan["binds"]:
        _bind(path)
    for link, target in plan["links"]:
        os.symlink(target, link)
    os.mkdir("/dev")
    for device in DEVICES:
        Path("/dev", device).touch()
        kernel.mount(f"{OLD}/dev/{device}", f"/dev/{device}", None, kernel.MS_BIND)
    for name, target in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]:
        os.symlink(target, f"/dev/{name}")
    os.symlink("/tmp", "/dev/shm")
    os.mkdir("/proc")
    with suppress(OSError):  # refused in containers that hide parts of /proc; Python works without it
        kernel.mount("proc", "/proc", "proc", safe | kernel.MS_NOEXEC)
    os.mkdir("/tmp")
    kernel.mount("tmp", "/tmp", "tmpfs", safe, f"size={plan['disk_mb']}m,nr_inodes=10k,mode=1777")
    kernel.unmount(OLD)
    os.rmdir(OLD)
    kernel.make_read_only("/", recursive=False)
    os.chdir("/tmp")


def _bind(path: str) -> None:
    """Show the host's file or folder at its own place, read-only."""
    source = Path(f"{OLD}{path}")
    target = Path(path)
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    kernel.mount(str(source), path, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.make_read_only(path)
