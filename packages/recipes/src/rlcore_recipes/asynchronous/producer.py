"""A thread that keeps rollout and reward processes at work, and hands their groups to the steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rlcore.batch import Batch
from rlcore.config import Choice
from rlcore.controller import Executor, Pending
from rlcore.errors import WorkerError
from rlcore_recipes.asynchronous.groups import GroupJob, check_fresh, group_job, sample_group, score_group
from rlcore_recipes.asynchronous.prompts import PromptQueue
from rlcore_recipes.asynchronous.schedule import Schedule
from rlcore_recipes.data.loader import LoaderState
from rlcore_recipes.data.prompts import PromptSample
from rlcore_recipes.updates import sync_policy

if TYPE_CHECKING:
    from rlcore_recipes.session import Session

POLL_S = 0.05
"""How often the thread looks whether more may be started, and a waiting step whether something is amiss."""
JOIN_S = 20.0
"""Longest wait for the thread's end: the start of a process in the place of a dead one may be under way."""


@dataclass(frozen=True)
class Filter:
    """Dynamic sampling: groups that ``keep`` does not let pass are dropped, at most ``most`` from step to step."""

    keep: Choice
    most: int


def open_producer(session: Session[Any]) -> Producer:
    """The producer that the configuration of ``session`` asks for; it does nothing before the first step."""
    config, dynamic, batch = session.config, session.dynamic, session.config.data.train_batch_size
    settings = config.asynchronous
    return Producer(
        session.executor,
        session.roles.rollout,
        session.roles.reward,
        PromptQueue(session.prompts),
        Schedule(batch, settings.max_staleness, session.total_steps),
        job=partial(group_job, config, stop_tokens=session.stop_tokens),
        version=lambda: session.version,
        catch_up=lambda: sync_policy(session, session.version),
        sampling_filter=None if dynamic is None else Filter(dynamic.filter, (dynamic.max_generations - 1) * batch),
        most_at_once=settings.max_concurrent_groups,
        patience_s=config.controller.call_timeout_s,
    )


@dataclass
class _Group:
    """A group on its way: it is sampled (``batch`` is None), then scored."""

    position: int
    pending: Pending[Any]
    batch: Batch | None = None


class Producer:
    """Samples and scores groups, one prompt each, for as long as `Schedule` lets it, and collects them as they finish.

    Workers that die are the executor's business: it asks others for what they left unanswered. Replaced rollout
    processes wait for the weights, which only the thread that trains can give, between two updates: in `take` at the
    latest.

    Args:
        job: what to ask for a prompt.
        version: of the policy that every rollout process has; may be behind the truth for a moment, never ahead of it.
        catch_up: gives replaced rollout processes the weights of ``version``.
        most_at_once: groups sampled at the same time; None: no limit but the schedule's.
        patience_s: longest wait for any group to finish.
    """

    described_by = LoaderState

    def __init__(
        self,
        executor: Executor,
        rollout: Any,
        reward: Any,
        prompts: PromptQueue,
        schedule: Schedule,
        *,
        job: Callable[[PromptSample], GroupJob],
        version: Callable[[], int],
        catch_up: Callable[[], None],
        sampling_filter: Filter | None = None,
        most_at_once: int | None = None,
        patience_s: float = 3600.0,
    ) -> None:
        self._executor = executor
        self._rollout = rollout
        self._reward = reward
        self._prompts = prompts
        self._schedule = schedule
        self._job = job
        self._version = version
        self._catch_up = catch_up
        self._filter = sampling_filter
        self._most_at_once = most_at_once
        self._patience_s = patience_s
        self._changed = threading.Condition()  # guards prompts, schedule and what follows
        self._batches: dict[int, Batch] = {}
        self._failed: set[int] = set()  # groups among them that did not pass the filter
        self._seen = self._passed = self._dropped = 0  # groups since the last step was taken
        self._progress = time.monotonic()
        self._failure: BaseException | None = None
        self._open: list[_Group] = []  # the thread's own
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, step: int) -> tuple[Batch, dict[str, float]]:
        """The groups that ``step`` trains on, in the order of their prompts; waits for them. The first call starts
        everything.

        Returns:
            the batch, and metrics: how long it was waited for, and what was ready and under way when it was complete.

        Raises:
            WorkerError: a worker failed, or none has finished anything for too long.
            RlcoreError: whatever else went wrong in the thread.
        """
        start = time.monotonic()
        if self._thread is None:
            self._schedule.taken = step - 1
            self._thread = threading.Thread(target=self._work, name="producer", daemon=True)
            self._thread.start()
        while (taken := self._take(start)) is None:
            if self._executor.behind(self._rollout):
                self._catch_up()
        batch, metrics = taken
        check_fresh(batch, step, self._schedule.max_staleness)
        return batch, {"async/wait_s": time.monotonic() - start, **metrics}

    @property
    def busy(self) -> bool:
        """Whether groups are under way, or could be started."""
        with self._changed:
            idle = self._thread is None or not self._thread.is_alive() or self._schedule.room(self._version()) <= 0
            return self._schedule.unfinished > 0 or not idle

    def state(self) -> dict[str, Any]:
        """Which prompts are done; groups under way, or waiting for their step, are sampled anew by a resumed run."""
        with self._changed:
            return self._prompts.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; before the first `take`."""
        self._prompts.restore(state)

    def close(self) -> None:
        """End the thread. What workers still do is given up; closing their engines aborts it."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(JOIN_S)

    # --- what the step does ----------------------------------------------------------------------------------------

    def _take(self, start: float) -> tuple[Batch, dict[str, float]] | None:
        """The next step's groups, or None if they are not there after a moment."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            groups = self._schedule.take()
            if groups is None:
                if time.monotonic() - max(start, self._progress) > self._patience_s:
                    raise WorkerError(self._late())
                self._changed.wait(POLL_S)
                return None
            metrics = {
                "async/ready": float(self._schedule.finished),
                "async/in_flight": float(self._schedule.unfinished),
                **self._filtered(groups),
            }
            for group in groups:
                self._prompts.done(group)
            batches = [self._batches.pop(group) for group in groups]
        return type(batches[0]).concat(batches), metrics

    def _filtered(self, groups: list[int]) -> dict[str, float]:
        """Metrics of dynamic sampling, as in synchronous training; a new step may drop groups anew."""
        if self._filter is None:
            return {}
        unfilled = len(self._failed.intersection(groups))
        found = {
            "dynamic_sampling/groups": float(self._seen),
            "dynamic_sampling/passed": self._passed / max(self._seen, 1),
            "dynamic_sampling/unfilled": unfilled / len(groups),
        }
        self._failed.difference_update(groups)
        self._seen = self._passed = self._dropped = 0
        return found

    def _late(self) -> str:
        waiting = [str(group.pending) for group in list(self._open)]
        names = ", ".join(dict.fromkeys(waiting[:4])) or "nobody"
        more = f" and {len(waiting) - 4} more" if len(waiting) > 4 else ""
        return f"no group was finished for {self._patience_s:g} s; asked is {names}{more}"

    # --- what the thread does --------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._stopped.is_set():
                self._start_groups()
                self._follow()
        except BaseException as error:  # it is the step's to raise
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _start_groups(self) -> None:
        """Ask for as many groups as may be started now."""
        while not self._stopped.is_set():
            sampling = sum(group.batch is None for group in self._open)
            with self._changed:
                version = self._version()
                full = self._most_at_once is not None and sampling >= self._most_at_once
                if full or self._schedule.room(version) <= 0:
                    return
                prompt = self._prompts.draw()
                self._schedule.start(prompt.position, version)
            pending = self._executor.one(self._rollout, sample_group, self._job(prompt))
            self._open.append(_Group(prompt.position, pending))

    def _follow(self) -> None:
        """Have sampled groups scored, and hand scored ones over."""
        if not self._open:
            self._stopped.wait(POLL_S)
            return
        by_pending = {id(group.pending): group for group in self._open}
        for pending in self._executor.wait([group.pending for group in self._open], POLL_S):
            group = by_pending[id(pending)]
            if group.batch is None:
                sampled = pending.result()
                group.batch = sampled[0]
                group.pending = self._executor.one(self._reward, score_group, sampled)
            else:
                self._open.remove(group)
                scores = pending.result()
                self._finish(group, group.batch.with_columns(**{name: scores[name] for name in scores.names}))

    def _finish(self, group: _Group, batch: Batch) -> None:
        with self._changed:
            self._progress = time.monotonic()
            self._seen += 1
            passes = self._filter is None or bool(self._filter.keep(batch["score"], batch["group"]).all())
            if not passes and self._filter is not None and self._dropped < self._filter.most:
                self._dropped += 1
                self._schedule.drop(group.position)
                self._prompts.done(group.position)
                return
            if passes:
                self._passed += 1
            else:
                self._failed.add(group.position)
            self._batches[group.position] = batch
            self._schedule.finish(group.position)
            self._changed.notify_all()
