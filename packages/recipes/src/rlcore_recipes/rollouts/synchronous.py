"""Groups that are rolled out when a step (or a validation) asks for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlcore.batch import Batch
from rlcore.controller import Pending
from rlcore.controller.pending import Done
from rlcore.engines.episode import PromptSample
from rlcore.progress import report
from rlcore_recipes.data.loader import LoaderState, PromptLoader
from rlcore_recipes.rollouts.coroutines import Answer, Coroutines
from rlcore_recipes.rollouts.group_job import GroupJob, run_groups
from rlcore_recipes.rollouts.plan import RolloutPlan
from rlcore_recipes.rollouts.roll_out import Group, roll_out
from rlcore_recipes.rollouts.scorer import score
from rlcore_recipes.rollouts.source import Deferred, Rollouts, joined, scores_of, trajectories_of
from rlcore_recipes.rollouts.workers import RolloutWorkers

PARTS = {"train": "gen", "baseline": "gen_baseline"}
"""The part of a step that episodes belong to, by the purpose of their job; others belong to "testing"."""


class Round(Coroutines):
    """Samples that are rolled out together, with as few calls to workers as possible.

    All episodes asked for so far are one call, and so are all scores: under ``torchrun`` every call is a meeting of all
    ranks, and an engine's last bits depend on what it computes together. Where rewards are computed in other processes,
    each group is scored as soon as its episodes have run.
    """

    def __init__(self, workers: RolloutWorkers, plan: RolloutPlan, samples: Sequence[PromptSample]) -> None:
        super().__init__()
        self._workers = workers
        self._episodes: list[tuple[GroupJob, Answer[Batch]]] = []
        self._scoring: list[_Scoring] = []
        self.groups = [Group(sample) for sample in samples]
        for group in self.groups:
            self.start(roll_out(group, plan, self))

    def sample(self) -> None:
        """Run the episodes that coroutines ask for, until none asks for more."""
        workers = self._workers
        while self._episodes:
            asked, self._episodes = self._episodes, []
            jobs = [job for job, _ in asked]
            with workers.timed(PARTS.get(jobs[0].purpose, "testing")):
                answers = workers.executor.stream(workers.rollout, run_groups, jobs)
                for number, ([index], trajectories) in enumerate(answers, 1):
                    if workers.executor.overlaps:
                        report("prompts answered", number, len(jobs))
                    self.answer(asked[index][1], trajectories)

    def finish(self) -> list[Group]:
        """Score until every coroutine has ended; return the groups, in the order of the samples."""
        while self._scoring:
            asked, self._scoring = self._scoring, []
            asked.sort(key=lambda one: int(one.trajectories["group"][0]))  # not in the order in which they were ready
            for one, scores in zip(asked, self._scores(asked)):
                self.answer(one.answer, scores)
        assert not self.waiting, "every coroutine ends when its groups are scored"
        return self.groups

    # --- what the coroutines ask for ---------------------------------------------------------------------------------

    def run_episodes(self, job: GroupJob) -> Answer[Batch]:
        """Note that ``job`` is to be run with the next call."""
        answer = Answer[Batch]()
        self._episodes.append((job, answer))
        return answer

    def score(self, trajectories: Batch) -> Answer[Batch]:
        """Note that ``trajectories`` are to be scored; ask for it now if other processes compute rewards."""
        workers, asked = self._workers, _Scoring(trajectories)
        if workers.executor.overlaps:
            with workers.timed.label("reward"):
                asked.pending = workers.executor.submit(workers.reward, score, trajectories)
        self._scoring.append(asked)
        return asked.answer

    def _scores(self, asked: Sequence[_Scoring]) -> list[Batch]:
        """Return the scores of each group: of the reward, and of the reward model added to them."""
        workers, batch = self._workers, joined([one.trajectories for one in asked])
        model = workers.reward_model
        values = None if model is None else model.values(batch)
        with workers.timed("reward"):
            if workers.executor.overlaps:
                found = []
                for number, one in enumerate(asked, 1):
                    assert one.pending is not None
                    found.append(one.pending.result())
                    report("prompts scored", number, len(asked))
                scores = joined(found)
            else:
                scores = workers.executor.submit(workers.reward, score, batch).result()
        if model is not None and values is not None:
            scores = model.added(scores, values, batch)
        ends = torch.tensor([len(one.trajectories) for one in asked]).cumsum(0).tolist()
        return [scores.slice(start, end) for start, end in zip([0, *ends], ends)]


@dataclass
class _Scoring:
    """Trajectories to score; ``pending`` where other processes are at it."""

    trajectories: Batch
    pending: Pending[Batch] | None = None
    answer: Answer[Batch] = field(default_factory=Answer)


def roll_out_together(workers: RolloutWorkers, plan: RolloutPlan, samples: Sequence[PromptSample]) -> Rollouts:
    """Roll out ``samples``; return when their episodes have run. Nothing is dropped."""
    with workers.generating():
        round_ = Round(workers, plan, samples)
        round_.sample()
    return Rollouts(trajectories_of(round_.groups), Deferred(lambda: scores_of(round_.finish())))


class SynchronousGroups:
    """Rolls out the groups of a step when the step asks for them.

    Args:
        batch_size: groups of a step.
        max_rounds: with dynamic sampling, maximum rounds of a step.
    """

    described_by = LoaderState

    def __init__(
        self, workers: RolloutWorkers, prompts: PromptLoader, plan: RolloutPlan, batch_size: int, max_rounds: int = 1
    ) -> None:
        self._workers = workers
        self._prompts = prompts
        self._plan = plan
        self._batch_size = batch_size
        self._max_rounds = max_rounds

    def take(self, step: int) -> Rollouts:
        """Return the samples that ``step`` trains on, as soon as their episodes have run."""
        if self._plan.keep is None:
            return roll_out_together(self._workers, self._plan, self._draw(self._batch_size))
        return self._take_kept()

    def _take_kept(self) -> Rollouts:
        """Dynamic sampling: return ``batch_size`` groups that the sampling filter keeps, in the order of their prompts.

        The first round rolls out as many samples as are wanted. Each later one replaces dropped groups: by as many as
        are likely to fill what is missing, going by the share of groups kept so far. Surplus groups are discarded: they
        would be off-policy in the next step. After ``max_rounds`` dropped groups fill the rest, as they would in GRPO,
        so that a task that is solved (or hopeless) ends no run.
        """
        wanted, groups, rounds = self._batch_size, list[Group](), 0
        kept: list[Group] = []
        with self._workers.generating():
            while len(kept) < wanted and rounds < self._max_rounds:
                likely = math.ceil((wanted - len(kept)) * len(groups) / len(kept)) if kept else wanted
                round_ = Round(self._workers, self._plan, self._draw(min(likely, wanted)))
                round_.sample()
                groups += round_.finish()
                kept = [group for group in groups if group.kept]
                rounds += 1
        chosen = [*kept, *(group for group in groups if not group.kept)][:wanted]
        metrics = {
            "dynamic_sampling/rounds": float(rounds),
            "dynamic_sampling/groups": float(len(groups)),
            "dynamic_sampling/passed": len(kept) / len(groups),
            "dynamic_sampling/unfilled": max(wanted - len(kept), 0) / wanted,
        }
        return Rollouts(trajectories_of(chosen), Done(scores_of(chosen)), metrics)

    def _draw(self, count: int) -> list[PromptSample]:
        """Return the next ``count`` samples, a multiple of the loader's batch size."""
        return [sample for _ in range(count // self._prompts.batch_size) for sample in next(self._prompts)]

    def state(self) -> dict[str, Any]:
        """Return the position in the data, as JSON."""
        return self._prompts.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self._prompts.restore(state)

    def close(self) -> None:
        """Do nothing: no group is under way between two steps."""
