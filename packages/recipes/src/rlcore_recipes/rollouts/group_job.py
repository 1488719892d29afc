"""Run the episodes of a group, in a rollout process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlcore.batch import Batch
from rlcore.engines import RolloutEngine
from rlcore.engines.episode import PromptSample
from rlcore.event_loop import Runner
from rlcore.progress import report
from rlcore_recipes.rollouts.episode import Episode
from rlcore_recipes.rollouts.trajectories import TreeRows, group_batch
from rlcore_recipes.run.seeds import sample_seed


@dataclass(frozen=True)
class GroupJob:
    """``n`` episodes of one sample.

    Attributes:
        seed: of the run. Every episode has its own, derived from it, from ``purpose`` and from the sample's position.
        purpose: "train", "baseline" or "validation".
        trees: how trajectories become rows; None: all have one row.
    """

    sample: PromptSample
    episode: Episode
    n: int
    seed: int
    purpose: str
    trees: TreeRows | None = None

    @property
    def seeds(self) -> list[int]:
        """The seed of each episode."""
        return [sample_seed(self.seed, self.purpose, self.sample.position, number) for number in range(self.n)]


async def run_group(engine: RolloutEngine, job: GroupJob) -> Batch:
    """Run the episodes of ``job``; return their trajectories (`group_batch`)."""
    episodes = (job.episode(engine, job.sample, seed) for seed in job.seeds)
    return group_batch(job.sample, await asyncio.gather(*episodes), job.trees)


def run_groups(engine: RolloutEngine, jobs: Sequence[GroupJob]) -> Iterator[tuple[list[int], Batch]]:
    """Run all ``jobs`` at the same time; yield the index and the trajectories of each as soon as it is complete."""
    with Runner() as runner:  # cancels what is unfinished if the caller stops early
        loop, done = runner.loop, 0
        tasks = {loop.create_task(run_group(engine, job)): index for index, job in enumerate(jobs)}
        waiting = set(tasks)
        while waiting:
            complete, waiting = runner.run(asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))
            for task in complete:
                task.exception()  # the first is raised; asyncio prints a traceback of each other that was not read
            for task in sorted(complete, key=tasks.__getitem__):
                done += jobs[tasks[task]].n
                report("completions generated", done, sum(job.n for job in jobs))
                yield [tasks[task]], task.result()
