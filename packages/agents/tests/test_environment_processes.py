"""Environments in worker processes, which are killed when they fail."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlcore.engines.episode import EpisodeRunner, Trajectory
from rlcore.errors import ConfigError

CODE = """
import subprocess

class World(Environment):
    async def reset(self, sample, seed):
        self.what = sample.messages[0]["content"]

    async def step(self, reply):
        pids = open(os.path.join(os.path.dirname(__file__), "pids"), "a")
        if self.what == "crash":
            os._exit(3)
        if self.what == "memory":
            bytearray(1 << 33)
        if self.what == "hang":
            child = subprocess.Popen(["sleep", "77"], start_new_session=True)
            print(os.getpid(), child.pid, file=pids, flush=True)
            time.sleep(60)
        await asyncio.sleep(0.01)
        if reply.text == "1":
            return Step("again", reward=0.5)
        return Step(done=True, score=1.0, info={"process": os.getpid()})
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, worlds: Callable[[Path], Any]) -> Any:
    return worlds(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runner(world: Any) -> Iterator[EpisodeRunner]:
    runner = world.runner(CODE, processes=2, startup_timeout_s=300, turn_timeout_s=3.0, memory_mb=4096)
    yield runner
    runner.close()


def play(world: Any, runner: EpisodeRunner, *kinds: str) -> list[Trajectory]:
    """Play an episode of each kind, all at the same time."""

    async def one(kind: str) -> Trajectory:
        sample = replace(world.sample, messages=[{"role": "user", "content": kind}])
        engine = world.engine(lambda prompt: "2" if "again" in prompt else "1")
        async with runner.slot():
            return await runner.run(engine, sample, 5)

    async def all_of_them() -> list[Trajectory]:
        return list(await asyncio.gather(*map(one, kinds)))

    return asyncio.run(all_of_them())


def test_more_episodes_than_processes_take_turns(world: Any, runner: EpisodeRunner) -> None:
    played = play(world, runner, *["fine"] * 6)
    assert [(each.score, each.invalid, each.metrics["turns"]) for each in played] == [(1.0, "", 2)] * 6
    assert [[segment.reward for segment in each.segments if segment.sampled] for each in played] == [[0.5, None]] * 6
    processes = {each.info["process"] for each in played}
    assert len(processes) <= 2
    assert os.getpid() not in processes


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("crash", "the worker process ended with code 3"),
        ("memory", "World.step raised MemoryError"),
    ],
)
def test_a_crash_costs_its_episode_alone(world: Any, runner: EpisodeRunner, kind: str, message: str) -> None:
    crashed, fine = play(world, runner, kind, "fine")
    assert message in crashed.invalid
    assert (fine.score, fine.invalid) == (1.0, "")
    assert play(world, runner, "fine")[0].score == 1.0


def test_nothing_is_left_of_an_environment_that_hangs(world: Any, runner: EpisodeRunner) -> None:
    start = time.monotonic()
    hangs, fine = play(world, runner, "hang", "fine")
    assert time.monotonic() - start < 3 + 5 + 60
    assert "the environment took longer than turn_timeout_s=3" in hangs.invalid
    assert fine.score == 1.0
    pids = (world.folder / "pids").read_text().split()
    assert len(pids) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_cancelled_episode_frees_its_process(world: Any, runner: EpisodeRunner) -> None:
    async def cancelled() -> None:
        tasks = [asyncio.ensure_future(asyncio.to_thread(play, world, runner, "fine"))]
        async with asyncio.timeout(20), runner.slot():
            running = asyncio.create_task(runner.run(world.engine(lambda _: "1"), world.sample, 5))
            await asyncio.sleep(0.3)
            running.cancel()
            await asyncio.gather(running, *tasks, return_exceptions=True)

    asyncio.run(cancelled())
    assert [each.score for each in play(world, runner, "fine", "fine", "fine")] == [1.0] * 3


def test_an_environment_that_cannot_be_loaded_is_named(worlds: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"environment .*world.py:Wrld': .* has no 'Wrld'; it has World"):
        worlds(tmp_path).runner(CODE, "Wrld", processes=1)
