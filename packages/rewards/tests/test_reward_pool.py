"""The pool against functions that do their worst, with real processes and small limits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlcore.engines.reward import RewardResult, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_rewards.function import FunctionOptions, function_reward
from rlcore_rewards.pool import PooledReward

MISCHIEF = """
import asyncio, ctypes, json, os, resource, signal, subprocess, sys, threading, time

def fork(action):
    pid = os.fork()
    if pid == 0:
        action()
        os._exit(0)
    return pid

def forever():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass

def note(pid):
    with open(os.environ["PIDS"], "a") as file:
        file.write(f"{pid}\\n")

def daemon():
    fork(lambda: (os.setsid(), note(fork(forever))))

def bomb():
    end = time.monotonic() + 3
    while time.monotonic() < end:
        note(os.getpid())
        os.fork()

def report(path):
    seen = {
        "environment": dict(os.environ),
        "modules": sorted(sys.modules),
        "stdin": sys.stdin.read(),
        "files": [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")],
        "a child's descriptors": subprocess.check_output(["ls", "/proc/self/fd"], text=True).split(),
    }
    with open(path, "w") as file:
        json.dump(seen, file)

class Unprintable(Exception):
    def __str__(self): raise RuntimeError
    __repr__ = __str__

def f(solution_str, ground_truth):
    note(os.getpid())
    exec(solution_str)
    return 1.0
"""


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Return the processes that functions have reported so far."""
    file = tmp_path / "pids"
    file.touch()
    monkeypatch.setenv("PIDS", str(file))
    return lambda: sorted({int(line) for line in file.read_text().split()})


@pytest.fixture
def build(tmp_path: Path, pids: Callable[[], list[int]]) -> Iterator[Callable[..., PooledReward]]:
    built: list[PooledReward] = []
    file = tmp_path / "mischief.py"
    file.write_text(MISCHIEF)

    def make(**settings: Any) -> PooledReward:
        limits = {"workers": 2, "timeout_s": 1.5, "memory_mb": 300, "max_processes": 20, "error_score": -1.0}
        options = FunctionOptions(path=f"{file}:f")
        built.append(function_reward(options, RewardSettings(**limits | {"pass_env": ("PIDS",)} | settings)))
        return built[-1]

    yield make
    for reward in built:
        reward.close()
    assert wait_until(lambda: not any(map(alive, pids()))), f"left behind: {[pid for pid in pids() if alive(pid)]}"


def do(code: str) -> RewardSample:
    return RewardSample([], code, "truth")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("raise ValueError('boom')", "exception", "ValueError: boom"),
        ("raise Unprintable", "exception", "Unprintable"),
        ("raise KeyboardInterrupt", "exception", "KeyboardInterrupt"),
        ("raise ValueError('x' * 10**7)", "exception", "xxx"),
        ("raise ValueError('x' * 200_000_000)", "exception", "ValueError, whose text cannot be formatted: MemoryError"),
        ("(g := lambda: g())()", "exception", "RecursionError|NameError"),
        ("raise asyncio.CancelledError", "exception", "CancelledError"),
        ("sys.exit(0)", "exit", "SystemExit"),
        ("os._exit(7)", "died", "ended with code 7"),
        ("print('last words', flush=True); os._exit(0)", "died", "ended with code 0; its last output: last words"),
        ("ctypes.string_at(0)", "died", "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "died", "SIGKILL"),
        ("os.kill(0, signal.SIGKILL)", "died", "SIGKILL"),
        ("os.kill(os.getppid(), signal.SIGKILL); forever()", "died", "SIGKILL"),
        ("os.closerange(0, 100)", "died", "ended"),
        ("while True: pass", "timeout", "timeout_s=1.5"),
        ("forever()", "timeout", "timeout_s=1.5"),
        ("9**9**9", "timeout", "timeout_s=1.5"),
        ("daemon(); forever()", "timeout", "timeout_s=1.5"),
        ("daemon(); os._exit(0)", "died", "code 0"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "timeout", "timeout_s=1.5"),
        ("bytearray(1 << 30)", "memory", "memory_mb"),
        ("[bytearray(1 << 20) for _ in range(1000)]", "memory", "memory_mb"),
        (
            "[fork(lambda: (resource.setrlimit(resource.RLIMIT_DATA, (2**28, 2**28)), x := bytearray(150 << 20), "
            "forever())) for _ in range(3)]; forever()",
            "memory",
            "held more than memory_mb=300",
        ),
        ("[note(fork(forever)) for _ in range(30)]; forever()", "processes", "max_processes=20"),
        ("bomb()", "processes", "max_processes=20"),
        ("while True: print('x' * 10**6)", "output", "max_output_kb=1024"),
        ("while True: os.write(2, b'x' * 10**6)", "output", "max_output_kb=1024"),
        ("subprocess.run(['sh', '-c', 'yes & yes'])", "output", "max_output_kb=1024"),
        (
            "[os.write(fd, b'garbage garbage') for fd in range(3, 200) if os.path.exists(f'/proc/self/fd/{fd}')]",
            None,
            "",
        ),
    ],
)
def test_a_misbehaving_function_costs_one_sample(
    build: Callable[..., PooledReward], caplog: pytest.LogCaptureFixture, code: str, kind: str | None, message: str
) -> None:
    reward = build()
    reward.score_batch([do("pass")])  # a first call has the start-up timeout
    samples = [do("pass"), do(code), *[do("time.sleep(0.01)")] * 8]
    before = time.monotonic()
    results = reward.score_batch(samples)
    assert time.monotonic() - before < 8
    assert [result.score for result in results] == [1.0, -1.0, *[1.0] * 8]
    assert [result.error for result in results] == [None, results[1].error, *[None] * 8]
    assert results[1].error == kind or (kind is None and results[1].error in ("protocol", "exception"))
    assert reward.stats() == {"samples": 11, "errors": 1, f"errors/{results[1].error}": 1}
    assert caplog.records
    assert re.search(message, caplog.text)
    assert len(caplog.text) < 10_000


def test_a_failure_costs_the_worker_only_where_it_must(build: Callable[..., PooledReward], pids: Any) -> None:
    reward = build(workers=1)
    for code in ("pass", "raise ValueError", "sys.exit()", "pass"):
        reward.score_batch([do(code)])
    assert len(pids()) == 1
    reward.score_batch([do("os._exit(0)"), do("pass")])
    assert len(pids()) == 2


def test_the_first_call_of_a_worker_may_import(build: Callable[..., PooledReward]) -> None:
    """So may first calls of later workers if they take about as long; other calls have the sample's timeout."""
    first = "time.sleep(0.7 if not globals().setdefault('imported', []) else 0); imported.append(1)"
    reward = build(workers=1, timeout_s=0.6)
    codes = [first, first, "time.sleep(9)", first, "os._exit(0)", "time.sleep(9)"]
    errors = [result.error for result in reward.score_batch([do(code) for code in codes])]
    assert errors == [None, None, "timeout", None, "died", "timeout"]


def test_each_kind_is_logged_once(build: Callable[..., PooledReward], caplog: pytest.LogCaptureFixture) -> None:
    reward = build(workers=1)
    reward.score_batch([do("raise ValueError('first')"), do("raise ValueError('second')"), do("sys.exit()")])
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "ValueError: first" in caplog.records[0].message
    assert reward.stats() == {"samples": 3, "errors": 3, "errors/exception": 2, "errors/exit": 1}


def test_workers_run_in_parallel_and_start_when_needed(build: Callable[..., PooledReward], pids: Any) -> None:
    reward = build(workers=4)
    reward.score_batch([do("pass")])
    assert len(pids()) == 1
    reward.score_batch([do("time.sleep(0.5)")] * 4)  # starts the others
    before = time.monotonic()
    reward.score_batch([do("time.sleep(0.5)")] * 8)
    assert time.monotonic() - before < 2  # one after the other: 4 seconds
    assert len(pids()) == 4


def test_a_worker_that_dies_while_idle_harms_no_sample(build: Callable[..., PooledReward], pids: Any) -> None:
    reward = build(workers=1)
    assert reward.score_batch([do("threading.Timer(0.1, os._exit, [0]).start()")])[0].score == 1.0
    assert wait_until(lambda: not alive(pids()[0]))
    assert reward.score_batch([do("pass")])[0].score == 1.0
    assert reward.stats()["errors"] == 0


def test_can_be_closed_when_a_worker_has_died(build: Callable[..., PooledReward], pids: Any) -> None:
    reward = build(workers=1)
    reward.score_batch([do("threading.Timer(0.1, os._exit, [0]).start()")])
    assert wait_until(lambda: not alive(pids()[0]))
    time.sleep(0.2)  # its guard ends, too
    reward.close()


def test_a_forked_copy_of_a_worker_does_not_answer(build: Callable[..., PooledReward]) -> None:
    reward = build(workers=1)
    assert [result.score for result in reward.score_batch([do("os.fork()")] * 5)] == [1.0] * 5
    assert reward.stats()["errors"] == 0


def test_big_samples_pass_through(build: Callable[..., PooledReward]) -> None:
    reward = build(workers=1)
    [result] = reward.score_batch([do("assert len(ground_truth) == 50_000_000")])
    assert result.error == "exception"
    sample = RewardSample([], "assert len(ground_truth) == 50_000_000", "x" * 50_000_000)
    assert reward.score_batch([sample])[0].score == 1.0


def test_a_sample_that_cannot_be_sent_fails_alone(build: Callable[..., PooledReward]) -> None:
    reward = build(workers=1)
    bad = RewardSample([], "pass", None, extra={"function": lambda: 0})
    assert [result.error for result in reward.score_batch([bad, do("pass")])] == ["request", None]


def test_workers_see_neither_the_trainer_nor_its_secrets(
    build: Callable[..., PooledReward], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("JUDGE_KEY", "known")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with open(tmp_path / "open in the trainer", "w") as file:
        os.set_inheritable(file.fileno(), True)
        reward = build(workers=1, pass_env=("PIDS", "JUDGE_KEY"))
        assert reward.score_batch([do(f"report({str(tmp_path / 'report')!r})")])[0].error is None
    seen = json.loads((tmp_path / "report").read_text())
    assert {"PATH", "JUDGE_KEY"} <= set(seen["environment"])
    assert "WANDB_API_KEY" not in seen["environment"]
    assert seen["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"torch", "numpy", "pydantic", "pytest", "rlcore.batch", "rlcore_rewards.pool"} & set(seen["modules"])
    assert seen["stdin"] == ""
    assert not [name for name in seen["files"] if "trainer" in name]
    assert seen["a child's descriptors"] == ["0", "1", "2", "3"]  # 3: the listing itself


def test_close_ends_what_is_being_scored(build: Callable[..., PooledReward]) -> None:
    reward = build(timeout_s=60)
    results: list[RewardResult] = []
    thread = threading.Thread(target=lambda: results.extend(reward.score_batch([do("forever()"), do("daemon()")])))
    thread.start()
    time.sleep(0.5)
    before = time.monotonic()
    reward.close()
    thread.join(5)
    assert time.monotonic() - before < 5
    assert [result.error for result in results] == ["died", None]


def test_a_fork_of_the_trainer_leaves_the_workers_alone(build: Callable[..., PooledReward]) -> None:
    reward = build()
    child = os.fork()
    if child == 0:
        reward.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert reward.score_batch([do("pass")])[0].score == 1.0
    assert reward.stats()["errors"] == 0


def test_no_descriptor_is_left_open(build: Callable[..., PooledReward]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    reward = build()
    reward.score_batch([do("pass"), do("os._exit(0)"), do("raise ValueError"), do("bytearray(1 << 30)")])
    reward.close()
    assert len(os.listdir("/proc/self/fd")) == before


TRAINER = """
import sys
from rlcore.engines.reward import RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_rewards.function import FunctionOptions, function_reward

settings = RewardSettings(workers=3, timeout_s=60, pass_env=("PIDS",))
reward = function_reward(FunctionOptions(path=sys.argv[1] + ":f"), settings)
results = reward.score_batch([RewardSample([], code, "") for code in sys.argv[2:]])
print([result.score for result in results])
"""


def test_workers_end_with_a_killed_trainer(build: Callable[..., PooledReward], tmp_path: Path, pids: Any) -> None:
    build().close()  # writes mischief.py
    codes = ["daemon(); forever()", "daemon(); 9**9**9", "pass"]
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path / "mischief.py"), *codes])
    assert wait_until(lambda: len(pids()) >= 4)
    time.sleep(0.3)
    assert sum(map(alive, pids())) >= 4
    trainer.kill()
    trainer.wait()
    assert wait_until(lambda: not any(map(alive, pids())))


def test_workers_end_with_a_trainer_that_forgets_to_close(
    build: Callable[..., PooledReward], tmp_path: Path, pids: Any
) -> None:
    build().close()
    command = [sys.executable, "-c", TRAINER, str(tmp_path / "mischief.py"), "daemon()", "pass"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout == "[1.0, 1.0]\n"
    assert wait_until(lambda: not any(map(alive, pids())))


def test_a_sample_whose_worker_was_killed_is_scored_again(
    build: Callable[..., PooledReward], pids: Any, tmp_path: Path
) -> None:
    """A sample is scored a second time after a kill from outside; a sample that kills its workers fails then."""
    reward = build(workers=1, timeout_s=60)
    going = tmp_path / "going on"
    sample = do(f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(going)!r}), True)]")
    results: list[RewardResult] = []
    thread = threading.Thread(target=lambda: results.extend(reward.score_batch([sample])))
    thread.start()
    assert wait_until(lambda: len(pids()) == 1)
    os.kill(pids()[0], signal.SIGKILL)
    assert wait_until(lambda: len(pids()) == 2)
    going.touch()
    thread.join(10)
    assert [(result.score, result.error) for result in results] == [(1.0, None)]
    assert reward.stats() == {"samples": 1, "errors": 0}
    assert reward.score_batch([do("os.kill(os.getpid(), signal.SIGKILL)")])[0].error == "died"
    assert len(pids()) == 3  # the second one, and one more
    assert reward.stats() == {"samples": 2, "errors": 1, "errors/died": 1}
