"""Groups that are rolled out ahead, by a thread that keeps rollout and reward processes at work while steps train."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from rlcore.batch import Batch
from rlcore.controller import Pending
from rlcore.controller.pending import Done
from rlcore.errors import EngineError, WorkerError
from rlcore_recipes.data.loader import LoaderState
from rlcore_recipes.rollouts.coroutines import Answer, Coroutines
from rlcore_recipes.rollouts.group_job import GroupJob, run_group
from rlcore_recipes.rollouts.group_scheduler import GroupScheduler
from rlcore_recipes.rollouts.plan import RolloutPlan
from rlcore_recipes.rollouts.prompt_queue import PromptQueue
from rlcore_recipes.rollouts.roll_out import Group, roll_out
from rlcore_recipes.rollouts.scorer import score
from rlcore_recipes.rollouts.source import Deferred, Rollouts, scores_of, trajectories_of
from rlcore_recipes.rollouts.workers import RolloutWorkers

T = TypeVar("T")

POLL_S = 0.05
"""Seconds between two looks of the thread for groups to start, and of a waiting step for failures."""
JOIN_S = 20.0
"""Timeout for the end of the thread: it may be starting a process that replaces a dead one."""


class Call(Answer[T], Generic[T]):
    """The answer to a call that some worker process is executing."""

    def __init__(self, pending: Pending[T]) -> None:
        super().__init__()
        self.pending = pending


class InFlight(Coroutines):
    """Samples that are rolled out one by one: every call goes to the worker process with the least to do."""

    def __init__(self, workers: RolloutWorkers) -> None:
        super().__init__()
        self._workers = workers
        self._calls: list[Call[Batch]] = []

    @property
    def idle(self) -> bool:
        """Whether no worker was asked for anything."""
        return not self._calls

    def poll(self, timeout_s: float) -> None:
        """Wait for answers, at most ``timeout_s``; resume the coroutines that await those that came."""
        calls = {id(call.pending): call for call in self._calls}
        for pending in self._workers.executor.wait_any([call.pending for call in self._calls], timeout_s):
            call = calls[id(pending)]
            self._calls.remove(call)
            self.answer(call, pending.result())

    def describe(self) -> str:
        """Name the workers that are waited for."""
        waiting = [str(call.pending) for call in list(self._calls)]
        names = ", ".join(dict.fromkeys(waiting[:4])) or "no worker"
        return names + (f" and {len(waiting) - 4} more" if len(waiting) > 4 else "")

    def run_episodes(self, job: GroupJob) -> Call[Batch]:
        """Ask a rollout process to run ``job``."""
        return self._call(self._workers.rollout, run_group, job)

    def score(self, trajectories: Batch) -> Call[Batch]:
        """Ask a reward process to score ``trajectories``."""
        return self._call(self._workers.reward, score, trajectories)

    def _call(self, workers: Any, function: Callable[..., Any], argument: Any) -> Call[Batch]:
        self._calls.append(Call(self._workers.executor.submit(workers, function, argument)))
        return self._calls[-1]


class AsynchronousGroups:
    """Rolls samples out for as long as the scheduler lets it, and hands finished groups to the steps.

    Workers that die are the executor's business: it asks others for what was left unanswered. Replaced rollout
    processes wait for the weights, which only the thread that trains can send, between two updates: in `take` at the
    latest.

    Args:
        version: returns the version of the policy that every rollout process has; it may lag behind for a moment, but
            is never ahead.
        catch_up: sends the weights of ``version`` to replaced rollout processes.
        max_concurrent: maximum groups whose episodes run at the same time; None: as many as the scheduler allows.
        max_drops: maximum groups that the sampling filter drops from one step to the next.
        timeout_s: timeout for any group to finish.
    """

    described_by = LoaderState

    def __init__(
        self,
        workers: RolloutWorkers,
        prompts: PromptQueue,
        scheduler: GroupScheduler,
        plan: RolloutPlan,
        *,
        version: Callable[[], int],
        catch_up: Callable[[], None],
        max_concurrent: int | None = None,
        max_drops: int = 0,
        timeout_s: float = 3600.0,
    ) -> None:
        self._workers = workers
        self._prompts = prompts
        self._scheduler = scheduler
        self._plan = plan
        self._version = version
        self._catch_up = catch_up
        self._max_concurrent = max_concurrent
        self._max_drops = max_drops
        self._timeout_s = timeout_s
        self._changed = threading.Condition()  # guards prompts, scheduler and the fields down to _failure
        self._finished: dict[int, Group] = {}  # by the position of their prompt
        self._seen = self._passed = self._dropped = 0  # groups since the last step was taken
        self._progress = time.monotonic()
        self._failure: BaseException | None = None
        self._in_flight = InFlight(workers)  # the thread's, as is _sampling
        self._sampling: list[Group] = []  # groups whose episodes run
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, step: int) -> Rollouts:
        """Return the groups that ``step`` trains on, in the order of their prompts; wait for them.

        The first call starts everything. Metrics say how long the step waited, and how many groups were finished and in
        flight when it had its own.

        Raises:
            WorkerError: a worker failed, or no group finished within the timeout.
            RlcoreError: anything else that went wrong in the thread.
        """
        start = time.monotonic()
        if self._thread is None:
            self._scheduler.taken = step - 1
            self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
            self._thread.start()
        with self._workers.timed("gen"):
            while (taken := self._taken(start)) is None:
                if self._workers.executor.has_stale_workers(self._workers.rollout):
                    self._catch_up()
        groups, metrics = taken
        batch, scores = trajectories_of(groups), scores_of(groups)
        check_fresh(batch, step, self._scheduler.max_staleness)
        metrics = {"async/wait_s": time.monotonic() - start, **metrics}
        model = self._workers.reward_model
        if model is None:
            return Rollouts(batch, Done(scores), metrics)
        values = model.values(batch)  # here: a training engine takes calls of this thread alone
        return Rollouts(batch, Deferred(lambda: model.added(scores, values, batch)), metrics)

    @property
    def busy(self) -> bool:
        """Whether groups are in flight, or could be started."""
        with self._changed:
            idle = self._thread is None or not self._thread.is_alive() or self._scheduler.capacity(self._version()) <= 0
            return self._scheduler.unfinished > 0 or not idle

    def state(self) -> dict[str, Any]:
        """Return which prompts are done; a resumed run rolls out the others again, finished or not."""
        with self._changed:
            return self._prompts.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; before the first `take`."""
        self._prompts.restore(state)

    def close(self) -> None:
        """End the thread. Groups in flight are given up: closing their engines aborts them."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(JOIN_S)

    # --- in the thread that trains -----------------------------------------------------------------------------------

    def _taken(self, start: float) -> tuple[list[Group], dict[str, float]] | None:
        """Return the next step's groups, or None if they are not finished after a moment."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            positions = self._scheduler.take()
            if positions is None:
                if time.monotonic() - max(start, self._progress) > self._timeout_s:
                    names = self._in_flight.describe()
                    raise WorkerError(f"no group was finished within {self._timeout_s:g} s; waiting for {names}")
                self._changed.wait(POLL_S)
                return None
            groups = [self._finished.pop(position) for position in positions]
            for position in positions:
                self._prompts.done(position)
            metrics = {
                "async/ready": float(self._scheduler.finished),
                "async/in_flight": float(self._scheduler.unfinished),
                **self._filtered(groups),
            }
            return groups, metrics

    def _filtered(self, groups: list[Group]) -> dict[str, float]:
        """Return the metrics of dynamic sampling, as in synchronous training; start counting for the next step."""
        if self._plan.keep is None:
            return {}
        found = {
            "dynamic_sampling/groups": float(self._seen),
            "dynamic_sampling/passed": self._passed / max(self._seen, 1),
            "dynamic_sampling/unfilled": sum(not group.kept for group in groups) / len(groups),
        }
        self._seen = self._passed = self._dropped = 0
        return found

    # --- in the background thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._stopped.is_set():
                while (group := self._next()) is not None:
                    self._in_flight.start(self._produce(group))
                if self._in_flight.idle:
                    self._stopped.wait(POLL_S)
                else:
                    self._in_flight.poll(POLL_S)
        except BaseException as error:  # the step raises it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next(self) -> Group | None:
        """Return a group to start now; None if there is none."""
        self._sampling = [group for group in self._sampling if group.trajectories is None]
        with self._changed:
            version = self._version()
            full = self._max_concurrent is not None and len(self._sampling) >= self._max_concurrent
            if self._stopped.is_set() or full or self._scheduler.capacity(version) <= 0:
                return None
            group = Group(self._prompts.draw())
            self._scheduler.start(group.sample.position, version)
            self._sampling.append(group)
            return group

    async def _produce(self, group: Group) -> None:
        """Roll ``group`` out, and finish or drop it."""
        await roll_out(group, self._plan, self._in_flight)
        position = group.sample.position
        with self._changed:
            self._progress = time.monotonic()
            self._seen += 1
            self._passed += group.kept
            if not group.kept and self._dropped < self._max_drops:
                self._dropped += 1
                self._scheduler.drop(position)
                self._prompts.done(position)
                return
            self._finished[position] = group
            self._scheduler.finish(position)
            self._changed.notify_all()


def check_fresh(batch: Batch, step: int, max_staleness: int) -> None:
    """Check that no token of ``batch`` is older than ``max_staleness`` versions when ``step`` trains on it.

    Raises:
        EngineError: one is; as groups are scheduled, only if an engine did not take over weights or miscounts.
    """
    made = batch["response_length"] > 0
    staleness = int((step - 1 - batch["policy_version"])[made].max()) if bool(made.any()) else 0
    if staleness > max_staleness:
        raise EngineError(
            f"a sample for step {step} has tokens that are {staleness} versions old, and async.max_staleness is "
            f"{max_staleness}: the rollout engine reports an older version than that of the weights it received"
        )
