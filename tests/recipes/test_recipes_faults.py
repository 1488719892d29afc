"""Runs over Ray whose processes are killed at random moments: the weights must not know, and nothing may stay."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

STEPS = 8
GONE_S = 60.0  # no bound on speed: longer than anything takes that ends by itself, well under Ray's minute of waiting
WAIT_S = 300.0
PR_SET_CHILD_SUBREAPER = 36
RUN = {
    "controller.kind": "ray",
    "controller.pools": {"train": {"processes": 2}},
    "controller.restart_backoff_s": 0.1,
    "trainer.total_steps": STEPS,
    "trainer.save_freq": 2,
    "trainer.save_hf": True,
    "actor.fsdp.device": "cpu",
    "actor.optim.lr": 1e-3,
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {**RUN, "actor.mini_batch_size": 4}),
    "ppo": ("ppo", {**RUN, "actor.epochs": 2, "critic.fsdp.device": "cpu"}),
    "rollout apart": (
        "grpo",
        {
            **RUN,
            "controller.pools": {"train": {}, "gen": {"processes": 2}},
            "controller.placement": {"actor": "train", "rollout": "gen"},
            "rollout.inline": {"batch_invariant": True, "device": "cpu"},
        },
    ),
}


# --- processes ------------------------------------------------------------------------------------------------------


STANDING: set[psutil.Process] = set()
"""Processes of the test session: the fork server, and Ray's for the runs that nothing happens to."""
OF_OTHERS = ("psm_", "sem.", "sgl")
"""Names in /dev/shm that vLLM, SGLang and Python's multiprocessing give: their tests may run at the same time."""


@pytest.fixture(autouse=True)
def nothing_stays(cluster: None) -> Iterator[None]:
    """Orphans come to this process instead of init, so that whatever a test leaves behind is found below it."""
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    STANDING.update(psutil.Process().children())
    shared = shared_memory()
    yield
    assert wait_until(lambda: not family(), GONE_S), [process.cmdline() for process in family()]
    assert wait_until(lambda: shared_memory() <= shared, GONE_S), shared_memory() - shared


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if not name.startswith(OF_OTHERS)}


def family() -> list[psutil.Process]:
    """Return the running processes that a test started: what descends from this process, without `STANDING`."""
    found, standing = psutil.Process().children(recursive=True), {process.pid for process in STANDING}
    for process in found:  # parents come before their children
        with suppress(psutil.NoSuchProcess):
            if process.ppid() in standing:
                standing.add(process.pid)
    return [process for process in found if process.pid not in standing and alive(process)]


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], Any], seconds: float = WAIT_S, pause: float = 0.1) -> Any:
    """What ``condition`` returns, once that is true; something false after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(pause)  # a look at all processes costs as much as a tenth of it
    return found


def steps_done(out_dir: Path) -> int:
    log = out_dir / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def worker(out_dir: Path, name: str) -> psutil.Process | None:
    """The process whose output goes to the log of that worker."""
    log = str(out_dir.resolve() / "logs" / f"{name}.log")
    for process in family():
        try:
            if os.readlink(f"/proc/{process.pid}/fd/1") == log and "raylet" in process.parent().name():
                return process
        except (OSError, psutil.Error, AttributeError):
            continue
    return None


def scorers(out_dir: Path) -> list[psutil.Process]:
    """The processes that run the reward's function, below those that guard them."""
    found = []
    for process in family():
        try:
            if "rlcore_rewards.worker" in process.cmdline() and "rlcore_rewards.worker" in process.parent().cmdline():
                found.append(process)
        except (psutil.Error, AttributeError):
            continue
    return found


# --- runs -----------------------------------------------------------------------------------------------------------


def start(task: Any, layout: str, out_dir: Path, **changes: Any) -> subprocess.Popen[str]:
    recipe, keys = LAYOUTS[layout]
    return task.start(recipe, out_dir, {**keys, **changes}, new_session=True)


@pytest.fixture(scope="module")
def slow_reward(task: Any) -> dict[str, str]:
    """The task's reward, taking its time: a step lasts long enough for something to happen in it."""
    path = task.folder / "slow_reward.py"
    path.write_text(task.reward.read_text().replace("    return", "    import time; time.sleep(0.05)\n    return"))
    return {"reward.path": f"{path}:compute_score"}


def ended(process: subprocess.Popen[str]) -> str:
    """The output of a run that ends by itself."""
    output, _ = process.communicate(timeout=WAIT_S)
    return output


def checkpoint(out_dir: Path, process: subprocess.Popen[str], step: int) -> None:
    path = out_dir / "checkpoints" / f"step-{step:06d}"
    assert wait_until(lambda: path.exists() or process.poll() is not None)
    assert process.poll() is None, ended(process)


def strike(process: subprocess.Popen[str], find: Callable[[], psutil.Process | None]) -> int:
    """Kill what ``find`` finds, as soon as there is something."""
    victim = wait_until(lambda: find() or process.poll() is not None)
    assert process.poll() is None, ended(process)
    assert victim, "no process to kill"
    victim.send_signal(signal.SIGKILL)
    return victim.pid


@pytest.fixture(scope="module")
def undisturbed(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The output folder of a layout's run that nothing happened to."""
    made: dict[str, Path] = {}

    def run(layout: str, **changes: Any) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("undisturbed")
            recipe, keys = LAYOUTS[layout]
            result = task.run(recipe, made[layout], {**keys, **changes})
            assert result.exit_code == 0, result.output
        return made[layout]

    return run


def assert_same(found: Path, expected: Path, metrics_of: Callable[[Path], Any], start_weights: Path) -> None:
    """Bit-identical weights, every step once, the same scores."""
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (found, expected))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    trained = load_file(start_weights / "model.safetensors")
    assert not all(one[name].equal(trained[name]) for name in one)
    assert [line["step"] for line in metrics_of(found)] == list(range(1, STEPS + 1))
    for name in ("critic/score/mean", "response_length/mean"):
        assert [line[name] for line in metrics_of(found)] == [line[name] for line in metrics_of(expected)]


@pytest.mark.slow
def test_everything_killed_in_a_checkpoint_then_a_trainer_rank(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    chance = random.Random("grpo")
    first = start(task, "grpo", tmp_path)
    checkpoint(tmp_path, first, 2)
    assert wait_until(lambda: list((tmp_path / "checkpoints").glob("*.tmp")) or first.poll() is not None, pause=0.002)
    assert first.poll() is None, ended(first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert wait_until(lambda: not family(), GONE_S), [process.cmdline() for process in family()]
    assert not (tmp_path / "model").exists()

    second = start(task, "grpo", tmp_path)
    checkpoint(tmp_path, second, 4)
    rank = chance.randrange(2)
    assert wait_until(lambda: steps_done(tmp_path) >= 4)
    time.sleep(chance.uniform(0, 0.5))
    dead = strike(second, lambda: worker(tmp_path, f"train-{rank}"))
    output = ended(second)
    assert second.returncode == 0, output
    restarts = [line for line in output.splitlines() if line.startswith("restart ")]
    assert len(restarts) == 1, output
    assert restarts[0].startswith("restart 1 of 3 in 0.1 s, from ")
    assert f"train[{rank}] (process {dead} on 127.0.0.1, log {tmp_path.resolve()}/logs/train-{rank}.log)" in output
    assert "Traceback" not in output
    assert "continuing after step" in output
    assert_same(tmp_path, undisturbed("grpo"), metrics_of, task.model)


@pytest.mark.slow
def test_interrupted_then_the_driver_killed_then_a_trainer_rank(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    chance = random.Random("ppo")
    first = start(task, "ppo", tmp_path, **{"trainer.save_freq": 100})
    assert wait_until(lambda: steps_done(tmp_path) or first.poll() is not None)
    first.send_signal(signal.SIGINT)
    output = ended(first)
    assert first.returncode == 130, output
    done = metrics_of(tmp_path)[-1]["step"]
    assert f"stopped after step {done} of {STEPS}; run the same command again to continue" in output
    assert "Traceback" not in output

    second = start(task, "ppo", tmp_path, **{"trainer.save_freq": 1})
    checkpoint(tmp_path, second, done + 1)
    time.sleep(chance.uniform(0, 0.5))
    second.kill()  # the driver alone
    second.communicate()
    assert wait_until(lambda: not family(), GONE_S), [process.cmdline() for process in family()]

    third = start(task, "ppo", tmp_path, **{"trainer.save_freq": 1})
    strike(third, lambda: worker(tmp_path, f"train-{chance.randrange(2)}"))  # as soon as it is there
    output = ended(third)
    assert third.returncode == 0, output
    assert "restart 1 of 3" in output
    assert_same(tmp_path, undisturbed("ppo"), metrics_of, task.model)


@pytest.mark.slow
def test_replaced_workers_change_nothing(
    task: Any,
    metrics_of: Callable[[Path], Any],
    tmp_path: Path,
    undisturbed: Callable[..., Path],
    slow_reward: dict[str, str],
) -> None:
    """A rollout process, the process that scores, and one that runs the reward's function."""
    chance = random.Random("replaced")
    process = start(task, "rollout apart", tmp_path, **slow_reward, **{"controller.max_restarts": 0})
    victims: list[tuple[str, Callable[[], psutil.Process | None]]] = [
        ("gen[0]", lambda: worker(tmp_path, "gen-0")),
        ("cpu[0]", lambda: worker(tmp_path, "cpu-0")),
        ("a reward function's process", lambda: next(iter(scorers(tmp_path)), None)),
        ("gen[1]", lambda: worker(tmp_path, "gen-1")),
    ]
    chance.shuffle(victims)
    for step, (_, find) in enumerate(victims, 1):
        assert wait_until(lambda step=step: process.poll() is not None or steps_done(tmp_path) >= step)
        time.sleep(chance.uniform(0, 0.5))
        strike(process, find)
    output = ended(process)
    assert process.returncode == 0, output
    for name, _ in victims:
        if "[" in name:
            assert f"on {name} (process " in output
    assert output.count("it is replaced") == 3
    assert "Traceback" not in output
    assert_same(tmp_path, undisturbed("rollout apart", **slow_reward), metrics_of, task.model)


@pytest.mark.slow
def test_restarts_are_bounded(task: Any, tmp_path: Path) -> None:
    """A run without checkpoints starts from its beginning, and gives up at last."""
    process = start(task, "grpo", tmp_path, **{"controller.max_restarts": 1, "trainer.save_freq": -1})
    first = strike(process, lambda: worker(tmp_path, "train-1"))
    output = strike_again(process, tmp_path, first)
    assert process.returncode == 1, output
    assert "restart 1 of 1 in 0.1 s, from the beginning: " in output
    assert "error: gave up after 1 restart (controller.max_restarts=1): " in output
    assert "there is no checkpoint to continue from: trainer.save_freq is -1" in output
    assert "Traceback" not in output


def strike_again(process: subprocess.Popen[str], out_dir: Path, before: int) -> str:
    """Kill a trainer of the run that was started again; the output."""

    def another() -> psutil.Process | None:
        found = worker(out_dir, "train-1")
        return found if found is not None and found.pid != before else None

    strike(process, another)
    return ended(process)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_call_that_hangs(task: Any, tmp_path: Path) -> None:
    reward = tmp_path / "hangs.py"
    reward.write_text(
        "import pathlib, time\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        f"    pathlib.Path({str(tmp_path / 'scoring')!r}).touch()\n"
        "    time.sleep(10000)\n"
    )
    changes = {"reward.path": f"{reward}:compute_score", "reward.timeout_s": 10000}
    process = start(task, "grpo", tmp_path / "out", **changes)
    assert wait_until(lambda: (tmp_path / "scoring").exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert any(
        "stopping after this step (Ctrl-C again: immediately)" in line for line in iter(process.stdout.readline, "")
    )
    process.send_signal(signal.SIGINT)
    output = ended(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output


@pytest.mark.slow
def test_ctrl_c_while_workers_start(task: Any, tmp_path: Path) -> None:
    process = start(task, "grpo", tmp_path)
    assert wait_until(lambda: worker(tmp_path, "train-0") or process.poll() is not None)
    assert process.poll() is None, ended(process)
    process.send_signal(signal.SIGINT)
    output = ended(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not (tmp_path / "metrics.jsonl").exists()
