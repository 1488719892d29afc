"""What code in a sandbox cannot do, in every way to make one that works here (`test_sandbox_choice` is about none)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlcore_kit.sandbox.detection import WAYS, fault
from rlcore_kit.sandbox.session import Result, Sandbox
from rlcore_kit.sandbox.settings import SandboxLimits

WORKING = [way for way in WAYS if not fault(way)]
SMALL = SandboxLimits(timeout_s=5, memory_mb=256, cpu_s=10, processes=8, disk_mb=8, output_kb=4, site_packages=False)

Open = Callable[..., Sandbox]


@pytest.fixture(params=WORKING)
def opened(request: pytest.FixtureRequest) -> Iterator[Open]:
    sandboxes: list[Sandbox] = []

    def start(**limits: object) -> Sandbox:
        sandboxes.append(Sandbox(SMALL.model_copy(update=limits), WAYS[request.param]))
        return sandboxes[-1]

    yield start
    for sandbox in sandboxes:
        sandbox.close()


def processes_of(sandbox: Sandbox) -> list[int]:
    """Return the processes of the host that are in the sandbox, by its namespace of the network."""
    outermost = sandbox._process.pid
    namespace = next(
        (os.readlink(f"/proc/{pid}/ns/net") for pid in (outermost, *_children(outermost)) if _leads_elsewhere(pid)), ""
    )
    assert namespace
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.readlink(f"/proc/{name}/ns/net") == namespace:
                found.append(int(name))
        except OSError:  # it has ended
            continue
    return found


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _leads_elsewhere(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def alive(pids: list[int]) -> list[int]:
    """Return those of ``pids`` that still run within five seconds' grace."""
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def test_code_runs_like_cells_of_a_notebook(opened: Open) -> None:
    sandbox = opened()

    assert sandbox.run_code("x = 20\nprint('hello')\nx + 1") == Result("hello\n21\n", "", True)
    assert sandbox.run_code("import sys\nprint('ü', file=sys.stderr)\nx * 2") == Result("40\n", "ü\n", True)
    assert sandbox.run_code("") == Result("", "", True)
    assert sandbox.run_code("def f(n):\n    return n and f(n - 1)\nf(3)\nNone").ok
    assert sandbox.run_code("exit()") == Result("", "", True)
    assert sandbox.run_code("x").stdout == "20\n"


def test_error_of_the_code_is_its_traceback_and_the_state_stays(opened: Open) -> None:
    sandbox = opened()
    result = sandbox.run_code("y = 1\ndef f():\n    return y / 0\nf()")

    assert not result.ok
    assert not result.ended
    assert result.stderr.startswith('Traceback (most recent call last):\n  File "<code 1>", line 4, in <module>')
    assert "return y / 0" in result.stderr
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "SyntaxError" in sandbox.run_code("1 +").stderr
    assert "null bytes" in sandbox.run_code("\0").stderr
    assert "RecursionError" in sandbox.run_code("def g(): g()\ng()").stderr
    assert sandbox.run_code("y").stdout == "1\n"


def test_what_is_outside_cannot_be_seen(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    (tmp_path / "answers.txt").write_text("42")
    sandbox = opened()

    outside = [
        str(tmp_path / "answers.txt"),
        str(Path(__file__)),
        "/etc/passwd",
        "/etc/hostname",
        "/sys/kernel",
        "/home",
    ]
    assert sandbox.run_code(f"import os\n[path for path in {outside!r} if os.path.exists(path)]").stdout == "[]\n"
    seen = sandbox.run_code(
        "import os, glob\nfor path in ['/proc/self/environ', *glob.glob('/proc/[0-9]*/environ')]:\n"
        "    try: print(open(path).read())\n    except OSError: pass\nprint(dict(os.environ))"
    ).stdout
    assert "hunter2" not in seen
    assert "SECRET" not in seen
    assert sandbox.run_code("os.path.expanduser('~')").stdout == "'/tmp'\n"
    assert int(sandbox.run_code("max(int(name) for name in os.listdir('/proc') if name.isdigit())").stdout) < 10
    assert sandbox.run_code("os.environ['HOME'], os.listdir('/tmp')").stdout == "('/tmp', [])\n"
    assert sandbox.run_code("input()").stderr.endswith("EOFError: EOF when reading a line\n")


def test_nothing_outside_can_be_written(opened: Open, tmp_path: Path) -> None:
    sandbox = opened()
    code = """
import os
def attempt(path):
    try:
        with open(path, "w") as file: file.write("x")
        return path
    except OSError:
        return None
[path for path in map(attempt, PATHS) if path]
"""
    paths = [
        f"{folder}/rlcore-was-here" for folder in ("", "/usr", "/usr/lib", "/dev", "/etc", "/proc", sys.base_prefix)
    ]
    paths += [str(tmp_path / "x"), os.__file__, "/proc/sys/kernel/hostname", "/proc/1/oom_score_adj"]
    assert sandbox.run_code(f"PATHS = {paths!r}\n{code}").stdout == "[]\n"
    assert sandbox.run_code("attempt('/tmp/mine'), open('/tmp/mine').read()").stdout == "('/tmp/mine', 'x')\n"
    assert not list(tmp_path.iterdir())


def test_there_is_no_network(opened: Open) -> None:
    result = opened().run_code("import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=3)")
    assert "OSError: [Errno 101] Network is unreachable" in result.stderr


def test_privileges_cannot_be_gained(opened: Open) -> None:
    sandbox = opened()
    status = sandbox.run_code("print(open('/proc/self/status').read())").stdout
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(result):
    return result == -1 and ctypes.get_errno() in (1, 13, 38)
[refused(libc.unshare(0x10000000)), refused(libc.mount(b"t", b"/tmp", b"tmpfs", 0, None)),
 refused(libc.ptrace(16, 1, None, None)), refused(libc.memfd_create(b"m", 0)), refused(libc.setuid(0)),
 refused(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)) or os.uname().machine != "x86_64",
 refused(libc.shmget(0, 1 << 20, 0o1600)), refused(libc.kill(1, 9)) or True]
"""
    assert sandbox.run_code(code).stdout == f"{[True] * 8}\n"
    assert sandbox.run_code("'still here'").ok, "process 1 cannot be killed from inside"


def test_fork_bomb_is_bounded_and_ends_with_the_sandbox(opened: Open) -> None:
    sandbox = opened(timeout_s=1)
    inside = processes_of(sandbox)
    code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    seen: list[int] = []
    watch = threading.Timer(0.7, lambda: seen.extend(processes_of(sandbox)))
    watch.start()
    began = time.monotonic()
    result = sandbox.run_code(code)

    assert result.ended == "timeout"
    assert time.monotonic() - began < 5
    watch.join()
    assert len(inside) < len(seen) <= SMALL.processes + 3
    assert not alive(seen)
    assert not sandbox.run_code("1").ok


def test_memory_bombs_end_within_their_limit(opened: Open) -> None:
    sandbox = opened(timeout_s=10)
    assert sandbox.run_code("x = bytearray(1 << 30)").stderr.endswith("MemoryError\n")
    assert sandbox.run_code("1").ok
    # each process within its limit, all of them together not
    several = (
        "import os, time\nfor _ in range(3): os.fork()\n"
        "x = bytearray(120 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\ntime.sleep(30)"
    )
    assert sandbox.run_code(several).ended == "memory"


def test_disk_is_bounded(opened: Open) -> None:
    sandbox = opened()
    for folder in ("/tmp", "/dev/shm"):
        code = f"for n in range(40):\n    with open(f'{folder}/f{{n}}', 'wb') as file: file.write(bytes(1 << 20))"
        assert "OSError: [Errno 28] No space left on device" in sandbox.run_code(code).stderr


def test_endless_loops_end_at_the_timeout_with_all_processes(opened: Open) -> None:
    sandbox = opened(timeout_s=0.5)
    inside = processes_of(sandbox)
    began = time.monotonic()
    code = (
        "import signal, subprocess\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\n"
        "subprocess.Popen(['sleep', '60'], start_new_session=True)\nprint('begun', flush=True)\nwhile True: pass"
    )
    result = sandbox.run_code(code)

    assert (result.stdout, result.ended, result.ok) == ("begun\n", "timeout", False)
    assert time.monotonic() - began < 3
    assert inside
    assert not alive(inside)


def test_cpu_time_is_bounded(opened: Open) -> None:
    result = opened(cpu_s=1, timeout_s=20).run_code("while True: pass")
    assert result.ended == "CPU time"


def test_huge_output_is_cut_and_does_not_stop_the_code(opened: Open) -> None:
    sandbox = opened(timeout_s=20)
    result = sandbox.run_code("for _ in range(1000): print('x' * 10_000)\nimport sys\nsys.stderr.write('end')\ny = 1")

    assert result.ok
    assert result.stdout == "x" * 4096
    assert result.stderr == "end"
    assert result.cut == 1000 * 10_001 - 4096
    assert sandbox.run_code("y") == Result("1\n", "", True)
    assert sandbox.run_code("print('y' * 4000)").stdout == "y" * 4000 + "\n"


def test_code_that_ends_its_process_or_forges_reports_ends_the_sandbox_alone(opened: Open) -> None:
    assert opened().run_code("import os\nos._exit(0)") == Result("", "", False, "exit status 0")
    assert opened().run_code("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)").ended == "signal 11"
    for forged in ("x" * 5000, "[]\\n", "{\\n", '{"done": "x"'):
        sandbox = opened(timeout_s=1)
        result = sandbox.run_code(
            f"import os\nfor n in range(3, 64):\n    try: os.write(n, b'{forged}')\n"
            "    except OSError: pass\nos._exit(0)"
        )
        assert not result.ok
        assert result.ended


def test_child_that_leaves_the_code_by_fork_answers_nothing(opened: Open) -> None:
    sandbox = opened()
    assert sandbox.run_code("import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint('x')").stdout == "x\nx\n"
    assert sandbox.run_code("print('y')").stdout == "y\n"


def test_command_runs_with_its_input_and_exit_status(opened: Open) -> None:
    assert opened().run_command(["sh", "-c", "cat; echo err >&2; exit 3"], "given\n") == Result(
        "given\n", "err\n", False, "exit status 3"
    )
    done = opened().run_command(["true"])
    assert (done.ok, done.ended) == (True, "exit status 0")
    assert opened().run_command(["no-such-program"]).stderr == "no-such-program: No such file or directory\n"
    assert opened(timeout_s=0.3).run_command(["sleep", "60"]).ended == "timeout"


def test_kill_from_another_thread_ends_a_running_request(opened: Open) -> None:
    sandbox = opened(timeout_s=60)
    inside = processes_of(sandbox)
    threading.Timer(0.2, sandbox.kill).start()
    began = time.monotonic()

    assert sandbox.run_code("while True: pass").ended == "killed"
    assert time.monotonic() - began < 5
    assert not alive(inside)
    sandbox.close()
    sandbox.close()


def test_sandbox_ends_when_its_host_dies(opened: Open) -> None:
    used = opened().way
    way = next(name for name in WAYS if WAYS[name] is used)
    host = subprocess.Popen(
        [
            sys.executable, "-c",
            "from rlcore_kit.sandbox.detection import *\n"
            f"sandbox = Sandbox(SandboxLimits(timeout_s=60), WAYS[{way!r}])\n"
            "print(sandbox._process.pid, flush=True)\nsandbox.run_code('while True: pass')",
        ],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert host.stdout is not None
    outermost = int(host.stdout.readline())
    pids = [outermost, *_children(outermost)]
    pids += [child for pid in pids[1:] for child in _children(pid)]
    host.kill()
    host.communicate()

    assert len(pids) == 3
    assert not alive(pids)


def test_sandboxes_leave_no_process_and_no_descriptor(opened: Open) -> None:
    opened().close()
    before, children = len(os.listdir("/proc/self/fd")), _children(os.getpid())  # other tests have some
    for _ in range(10):
        sandbox = opened(timeout_s=0.05)
        sandbox.run_code("while True: pass")
        sandbox.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert _children(os.getpid()) == children


def test_installed_packages_can_be_imported_unless_they_are_hidden(opened: Open) -> None:
    code = "import pydantic"
    assert opened(site_packages=True, memory_mb=1024).run_code(code).ok
    assert "ModuleNotFoundError" in opened().run_code(code).stderr
