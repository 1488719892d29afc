"""Roll out one sample: the one path from a prompt to a scored group."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

import torch

from rlcore.batch import Batch
from rlcore.config import Algorithm
from rlcore.engines.episode import PromptSample
from rlcore_recipes.rollouts.group_job import GroupJob
from rlcore_recipes.rollouts.plan import RolloutPlan
from rlcore_recipes.rollouts.trees import scored_rows


class Calls(Protocol):
    """Calls to worker processes. Both methods return immediately; the awaitable gives the answer."""

    def run_episodes(self, job: GroupJob) -> Awaitable[Batch]:
        """Have a rollout process run the episodes of ``job``; the answer is their trajectories (`group_batch`)."""
        ...

    def score(self, trajectories: Batch) -> Awaitable[Batch]:
        """Have ``trajectories`` scored; the answer has ``score`` and the other columns of `Scorer.score`."""
        ...


@dataclass
class Group:
    """One sample on its way through `roll_out`.

    Attributes:
        trajectories: the rows of its episodes (`group_batch`); None until they have run.
        scores: the columns of `Scorer.score`, and ``baseline_score`` with a baseline; None until they are computed.
        kept: whether to train on it: False if the sampling filter dropped it.
    """

    sample: PromptSample
    trajectories: Batch | None = None
    scores: Batch | None = None
    kept: bool = True


async def roll_out(group: Group, plan: RolloutPlan, calls: Calls) -> None:
    """Roll out the sample of ``group``: ``plan.n`` episodes → scores → keep or drop."""
    group.trajectories = await calls.run_episodes(plan.job(group.sample))
    baseline_job = plan.baseline_job(group.sample)
    baseline = None if baseline_job is None else calls.run_episodes(baseline_job)  # runs while the others are scored
    group.scores = await calls.score(group.trajectories)
    if baseline is not None:
        compared = await calls.score(await baseline)
        group.scores = group.scores.with_columns(baseline_score=compared["score"].repeat_interleave(plan.n))
    if plan.keep is not None:
        group.kept = _keeps(plan.keep, group.trajectories, group.scores["score"])


def _keeps(keep: Algorithm, trajectories: Batch, scores: torch.Tensor) -> bool:
    """Return whether the sampling filter keeps a group, by the scores of its valid trajectories; not without any."""
    rows = scored_rows(trajectories)
    return bool(rows.any()) and bool(keep(scores[rows], trajectories["group"][rows]).all())
