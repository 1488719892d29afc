"""The scheduler under simulated completion orders, the prompts of a resumed run, and asynchronous groups on threads."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcore.batch import Batch
from rlcore.config import validate_config
from rlcore.engines import Completion, GenerationRequest, SamplingParams
from rlcore.engines.episode import PromptSample
from rlcore.errors import ConfigError, EngineError, WorkerError
from rlcore_recipes.data.loader import PromptLoader
from rlcore_recipes.grpo import GRPOConfig
from rlcore_recipes.rollouts.asynchronous import AsynchronousGroups, check_fresh
from rlcore_recipes.rollouts.episode import single_completion
from rlcore_recipes.rollouts.group_job import run_group
from rlcore_recipes.rollouts.group_scheduler import GroupScheduler
from rlcore_recipes.rollouts.plan import RolloutPlan, training_plan
from rlcore_recipes.rollouts.prompt_queue import PromptQueue
from rlcore_recipes.rollouts.workers import RolloutWorkers
from rlcore_recipes.run.timing import Timings
from rlcore_recipes.settings import DynamicSamplingSettings, RolloutSettings

TIMEOUT_S = 20.0


# --- the scheduler --------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A run whose groups finish in an order, and are dropped, as ``choices`` decides.

    It knows nothing of deadlines: it counts versions itself, and the run goes wrong here if the bound is exceeded.
    """

    batch: int
    k: int
    steps: int
    choices: random.Random
    drop_share: float = 0.0
    max_concurrent: int | None = None
    version: int = 0
    positions: int = 0
    started: dict[int, int] = field(default_factory=dict)  # version by group
    sampling: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    taken: list[list[int]] = field(default_factory=list)

    def run(self) -> None:
        scheduler = GroupScheduler(self.batch, self.k, self.steps)
        for step in range(1, self.steps + 1):
            self.start(scheduler)
            # some finish whether a step waits for them or not, as they do while a step trains
            for _ in range(self.choices.randint(0, len(self.sampling))):
                self.finish_one(scheduler)
                self.start(scheduler)
            while (groups := scheduler.take()) is None:
                assert self.sampling, f"step {step} waits, and nothing is under way"
                self.finish_one(scheduler)
                self.start(scheduler)
            self.check(step, groups)
            # while the step trains the version stays, and more is started and finished
            self.start(scheduler)
            for _ in range(self.choices.randint(0, len(self.sampling))):
                self.finish_one(scheduler)
                self.start(scheduler)
            self.version = step
        assert scheduler.finished == 0
        assert scheduler.unfinished == 0, "something was started that no step would take"

    def start(self, scheduler: GroupScheduler) -> None:
        while scheduler.capacity(self.version) > 0 and len(self.sampling) < (self.max_concurrent or 10**9):
            scheduler.start(self.positions, self.version)
            self.started[self.positions] = self.version
            self.sampling.append(self.positions)
            self.positions += 1

    def finish_one(self, scheduler: GroupScheduler) -> None:
        group = self.sampling.pop(self.choices.randrange(len(self.sampling)))
        if self.choices.random() < self.drop_share:
            scheduler.drop(group)
            self.dropped.append(group)
        else:
            scheduler.finish(group)

    def check(self, step: int, groups: list[int]) -> None:
        assert len(groups) == self.batch
        assert groups == sorted(groups)
        assert all(group not in self.sampling and group not in self.dropped for group in groups)
        assert not any(set(groups) & set(before) for before in self.taken)
        assert max(step - 1 - self.started[group] for group in groups) <= self.k
        self.taken.append(groups)


@settings(max_examples=300, deadline=None)
@given(
    batch=st.integers(1, 5),
    k=st.integers(0, 4),
    steps=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    drop_share=st.sampled_from([0.0, 0.3, 0.8]),
    max_concurrent=st.sampled_from([None, 1, 3]),
)
def test_no_group_is_ever_too_old_and_every_one_is_used_once(
    batch: int, k: int, steps: int, seed: int, drop_share: float, max_concurrent: int | None
) -> None:
    world = World(batch, k, steps, random.Random(seed), drop_share, max_concurrent)
    world.run()
    used = sorted(group for groups in world.taken for group in groups)
    assert sorted(used + world.dropped) == list(range(world.positions))
    assert len(used) == batch * steps


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 5), steps=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_without_staleness_the_order_is_the_synchronous_one(batch: int, steps: int, seed: int) -> None:
    world = World(batch, 0, steps, random.Random(seed))
    world.run()
    assert world.taken == [list(range(step * batch, (step + 1) * batch)) for step in range(steps)]


def test_generation_is_ahead_by_as_much_as_allowed_and_no_more() -> None:
    scheduler = GroupScheduler(batch=4, max_staleness=2, last_step=100)
    assert scheduler.capacity(0) == 12
    for group in range(12):
        scheduler.start(group, 0)
    assert scheduler.capacity(0) == 0
    for group in range(4, 8):
        scheduler.finish(group)
    assert scheduler.take() == [4, 5, 6, 7], "the others may still be in time for steps 2 and 3"
    assert scheduler.capacity(0) == 0
    assert scheduler.capacity(1) == 4


def test_a_group_that_is_due_is_waited_for() -> None:
    scheduler = GroupScheduler(batch=2, max_staleness=1, last_step=100)
    for group in range(4):
        scheduler.start(group, 0)
    for group in (1, 2):
        scheduler.finish(group)
    assert scheduler.take() == [1, 2]
    for group in (4, 5):
        scheduler.start(group, 1)
        scheduler.finish(group)
    scheduler.finish(3)
    assert scheduler.take() is None, "group 0 was started under version 0 and is due in step 2"
    scheduler.finish(0)
    assert scheduler.take() == [0, 3]


def test_young_groups_leave_room_for_older_ones() -> None:
    scheduler = GroupScheduler(batch=2, max_staleness=2, last_step=100)
    for group in range(5):  # due in step 3, and so are all: two steps have four places for them
        scheduler.start(group, 0)
    scheduler.start(5, 0)
    for group in (0, 1):
        scheduler.finish(group)
    assert scheduler.take() == [0, 1]
    for group in (6, 7):
        scheduler.start(group, 1)
        scheduler.finish(group)
    assert scheduler.take() is None, "after two young ones, four would be left for the two places of step 3"
    scheduler.finish(2)
    assert scheduler.take() is None
    scheduler.finish(3)
    assert scheduler.take() == [2, 3]


def test_nothing_is_started_that_no_step_needs() -> None:
    scheduler = GroupScheduler(batch=4, max_staleness=5, last_step=2)
    assert scheduler.capacity(0) == 8
    resumed = GroupScheduler(batch=4, max_staleness=5, last_step=10, taken=9)
    assert resumed.capacity(9) == 4


# --- prompts --------------------------------------------------------------------------------------------------------


class Prompts:
    """A data set of ``size`` prompts, each of which is its number."""

    def __init__(self, size: int) -> None:
        self.file_sizes = [size]
        self.fingerprints = ["numbers"]

    def __len__(self) -> int:
        return self.file_sizes[0]

    def __getitem__(self, index: int) -> PromptSample:
        return PromptSample(prompt_tokens=[index], messages=[], ground_truth=index, index=index)


def queue(batch_size: int = 3, size: int = 20) -> PromptQueue:
    return PromptQueue(PromptLoader(Prompts(size), batch_size, seed=5))  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    batch_size=st.sampled_from([1, 3]),
    rounds=st.lists(st.tuples(st.integers(0, 25), st.floats(0, 1)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_a_resumed_queue_gives_every_prompt_that_is_not_done_and_no_other(
    batch_size: int, rounds: list[tuple[int, float]], seed: int
) -> None:
    choices, done, state = random.Random(seed), list[int](), None
    expected = queue(batch_size)
    contents = {prompt.position: prompt.prompt_tokens for prompt in (expected.draw() for _ in range(200))}
    for draws, share in rounds:
        prompts = queue(batch_size)
        if state is not None:
            prompts.restore(json.loads(json.dumps(state)))
        drawn = [prompts.draw() for _ in range(draws)]
        # exactly those that are not done, from the first one on
        waiting = [position for position in sorted(contents) if position not in done]
        assert [prompt.position for prompt in drawn] == waiting[:draws]
        assert all(prompt.prompt_tokens == contents[prompt.position] for prompt in drawn)
        for prompt in choices.sample(drawn, round(share * len(drawn))):
            prompts.done(prompt.position)
            done.append(prompt.position)
        state = prompts.state()
    assert len(set(done)) == len(done)


def test_the_state_stays_small() -> None:
    prompts = queue()
    for _ in range(500):
        prompts.done(prompts.draw().position)
    assert prompts.state()["ahead"] in ([], [498, 499])


def test_a_queue_goes_on_from_a_synchronous_run() -> None:
    loader = PromptLoader(Prompts(20), 3, seed=5)  # type: ignore[arg-type]
    seen = [prompt.position for prompt in next(loader)]
    prompts = queue()
    prompts.restore(loader.state())
    assert prompts.draw().position == seen[-1] + 1


# --- groups in flight -----------------------------------------------------------------------------------------------


class Engine:
    """A rollout engine that makes ``length`` tokens, each after a moment, under whatever version it has by then.

    Attributes:
        hold: positions of prompts whose completions stand still in their middle.
    """

    def __init__(self, length: int = 6, moment_s: float = 0.002) -> None:
        self.version = 0
        self.length = length
        self.moment_s = moment_s
        self.hold: set[int] = set()
        self.fails: Exception | None = None
        self.asked: list[int] = []
        self.names: list[str] = []
        self.half: Counter[int] = Counter()  # completions by position that have come to their middle

    async def generate(self, request: GenerationRequest) -> Completion:
        assert request.group is not None
        self.asked.append(request.group)
        self.names.append(request.request_id)
        versions: list[tuple[int, int]] = []
        for token in range(self.length):
            await asyncio.sleep(self.moment_s * random.random() * 2)
            if token == self.length // 2:
                self.half[request.group] += 1
            while token == self.length // 2 and request.group in self.hold:
                await asyncio.sleep(0.01)
            versions.append((self.version, 1))
        if self.fails is not None:
            raise self.fails
        return Completion([7] * self.length, [0.0] * self.length, "stop", versions, request.request_id)


class LengthScorer:
    """Scores a completion by its prompt: 1 and 0 for the completions of even ones, 1 for all of odd ones."""

    def score(self, batch: Batch) -> Batch:
        odd = batch["group"] % 2 == 1
        first = torch.arange(len(batch)) % 2 == 0
        return Batch({"score": (odd | first).float()})


@dataclass
class InThread:
    """A pending result of a thread."""

    future: Future[Any]
    done = property(lambda self: self.future.done())

    def result(self) -> Any:
        return self.future.result()

    def __str__(self) -> str:
        return "a thread"


class Threads:
    """An executor: every call in a thread."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(64)
        self.is_behind = False

    def submit(self, group: Any, function: Callable[..., Any], *args: Any) -> InThread:
        def work() -> Any:
            answer = function(group, *args)
            return asyncio.run(answer) if asyncio.iscoroutine(answer) else answer

        return InThread(self.pool.submit(work))

    def wait_any(self, pending: Sequence[InThread], timeout_s: float) -> list[InThread]:
        done, _ = wait_for([one.future for one in pending], timeout_s, return_when=FIRST_COMPLETED)
        return [one for one in pending if one.future in done]

    def has_stale_workers(self, group: Any) -> bool:
        return self.is_behind


class Bench:
    """Asynchronous groups with all that they need, and a trainer's part in it."""

    def __init__(
        self, k: int = 1, batch: int = 4, steps: int = 8, keep: Any = None, baseline: Any = None, **options: Any
    ) -> None:
        self.executor, self.engine, self.version = Threads(), Engine(), 0
        self.prompts = queue(batch_size=batch, size=200)
        self.caught_up: list[threading.Thread] = []
        workers = RolloutWorkers(self.executor, self.engine, LengthScorer(), None, Timings(), False)  # type: ignore[arg-type]
        self.groups = AsynchronousGroups(
            workers,
            self.prompts,
            GroupScheduler(batch, k, steps),
            RolloutPlan(
                partial(single_completion, sampling=SamplingParams(max_tokens=8)),
                n=2,
                seed=0,
                baseline=baseline,
                keep=keep,
            ),
            version=lambda: self.version,
            catch_up=self.catch_up,
            **{"timeout_s": TIMEOUT_S, **options},
        )

    def catch_up(self) -> None:
        self.caught_up.append(threading.current_thread())
        self.executor.is_behind = False

    def sync(self, version: int) -> None:
        self.engine.version = version
        self.version = version

    def close(self) -> None:
        self.engine.hold.clear()
        self.groups.close()
        self.executor.pool.shutdown()


def taken(made: Bench, step: int) -> tuple[Batch, dict[str, float]]:
    """What ``step`` trains on, with its scores, and metrics."""
    samples = made.groups.take(step)
    return samples.batch.with_columns(score=samples.scores.result()["score"]), samples.metrics


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**options: Any) -> Bench:
        benches.append(Bench(**options))
        return benches[-1]

    yield make
    for made in benches:
        made.close()


@pytest.mark.parametrize("k", [0, 1, 3])
def test_steps_get_fresh_groups_while_others_are_made(bench: Callable[..., Bench], k: int) -> None:
    made, seen, mixed = bench(k=k, steps=8), list[int](), 0
    for step in range(1, 9):
        batch, metrics = taken(made, step)
        assert int((step - 1 - batch["policy_version"]).max()) <= k
        groups = batch["group"].tolist()
        assert groups == sorted(groups)
        seen += groups[::2]
        assert groups[::2] == groups[1::2], "completions of a prompt stand together"
        mixed += int((batch["later_version_tokens"] > 0).sum())
        assert {"async/wait_s", "async/ready", "async/in_flight"} <= set(metrics)
        assert batch["score"].tolist() == LengthScorer().score(batch)["score"].tolist()
        time.sleep(0.01)  # it trains
        made.sync(step)
    assert sorted(seen) == list(range(32)), "every prompt once, and none was started in vain"
    assert sorted(set(made.engine.asked)) == list(range(32))
    if k == 0:
        assert seen == sorted(seen)
        assert mixed == 0


def test_completions_go_on_under_new_weights(bench: Callable[..., Bench]) -> None:
    made = bench(k=1, steps=3)
    made.engine.hold = set(range(4, 8))
    first, _ = taken(made, 1)
    assert first["group"].tolist()[::2] == [0, 1, 2, 3]
    wait_until(lambda: sum(made.engine.half.get(group, 0) for group in (4, 5, 6, 7)) == 8)
    made.sync(1)
    made.engine.hold = set()
    second, _ = taken(made, 2)
    assert second["group"].tolist()[::2] == [4, 5, 6, 7]
    assert second["policy_version"].tolist() == [0] * 8
    assert second["later_version_tokens"].tolist() == [3] * 8
    assert second["token_version"].to_list()[0].tolist() == [-1, 0, 0, 0, 1, 1, 1]


def test_a_filter_leaves_groups_out_and_others_come_in_their_place(bench: Callable[..., Bench]) -> None:
    made = bench(k=1, steps=3, keep=filters_of("nonzero-spread"), max_drops=1000)
    counted = 0
    for step in range(1, 4):
        batch, metrics = taken(made, step)
        assert all(group % 2 == 0 for group in batch["group"].tolist())
        assert metrics["dynamic_sampling/unfilled"] == 0
        counted += int(metrics["dynamic_sampling/groups"])
        made.sync(step)
    assert counted >= 24 - 1
    state = made.groups.state()
    assert {1, 3, 5} <= set(state["ahead"]) | set(range(state["drawn"] * 4)), "what was left out is done with"


def test_a_filter_that_lets_nothing_pass_ends_no_run(bench: Callable[..., Bench]) -> None:
    made = bench(k=1, steps=2, keep=nothing_passes, max_drops=8)
    _, metrics = taken(made, 1)
    assert metrics["dynamic_sampling/unfilled"] == 1
    assert metrics["dynamic_sampling/passed"] == 0
    assert metrics["dynamic_sampling/groups"] >= 12
    made.sync(1)
    _, metrics = taken(made, 2)
    assert metrics["dynamic_sampling/unfilled"] == 1


def test_a_resumed_run_samples_again_what_no_step_had(bench: Callable[..., Bench]) -> None:
    made = bench(k=2, steps=6)
    made.engine.hold = {0, 2}  # due in step 3
    seen = [taken(made, 1)[0]["group"].tolist()[::2]]
    state = json.loads(json.dumps(made.groups.state()))
    again = bench(k=2, steps=6)
    again.groups.restore(state)
    again.sync(1)
    for step in range(2, 7):
        seen.append(taken(again, step)[0]["group"].tolist()[::2])
        again.sync(step)
    assert {0, 2}.isdisjoint(seen[0])
    assert set(again.engine.asked) >= {0, 2}
    assert sorted(group for groups in seen for group in groups) == list(range(24))


def test_what_goes_wrong_in_a_worker_reaches_the_step(bench: Callable[..., Bench]) -> None:
    made = bench(k=1)
    made.engine.fails = EngineError("out of memory, say")
    with pytest.raises(EngineError, match="out of memory, say"):
        made.groups.take(1)
    with pytest.raises(EngineError, match="out of memory, say"):
        made.groups.take(1)


def test_waiting_for_a_group_times_out(bench: Callable[..., Bench]) -> None:
    made = bench(k=1, timeout_s=0.5)
    made.engine.hold = set(range(200))
    with pytest.raises(WorkerError, match=r"no group was finished within 0.5 s; waiting for a thread( and \d+ more)?"):
        made.groups.take(1)


def test_closing_does_not_wait_for_what_is_under_way(bench: Callable[..., Bench]) -> None:
    made = bench(k=2)
    made.engine.hold = set(range(4, 200))
    made.groups.take(1)
    made.groups.close()
    assert not any(thread.name == "rollouts" and thread.is_alive() for thread in threading.enumerate())


def test_replaced_processes_get_the_weights_from_the_thread_that_trains(bench: Callable[..., Bench]) -> None:
    made = bench(k=1)
    made.engine.hold = set(range(200))
    made.executor.is_behind = True
    threading.Timer(0.3, made.engine.hold.clear).start()
    made.groups.take(1)
    assert made.caught_up == [threading.current_thread()]


def test_the_number_of_groups_sampled_at_the_same_time_is_limited(bench: Callable[..., Bench]) -> None:
    made = bench(k=2, max_concurrent=3)
    most = 0
    count = made.engine.generate
    running = 0

    async def counted(request: GenerationRequest) -> Completion:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await count(request)
        finally:
            running -= 1

    made.engine.generate = counted  # type: ignore[method-assign]
    made.groups.take(1)
    assert 0 < most <= 2 * 3, "two completions each"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def nothing_passes(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """A filter that lets nothing pass."""
    return torch.zeros(len(scores), dtype=torch.bool)


def filters_of(name: str) -> Any:
    return DynamicSamplingSettings(filter=name).filter  # type: ignore[arg-type]


# --- what workers do ------------------------------------------------------------------------------------------------


def test_a_baseline_is_sampled_greedily_and_scored_for_every_sample(bench: Callable[..., Bench]) -> None:
    config = SimpleNamespace(
        rollout=RolloutSettings(n=3),
        data=SimpleNamespace(max_response_length=8),
        given_first=False,
        response_key=None,
        seed=0,
        needed_columns=frozenset({"baseline_score"}),
        dynamic_sampling=None,
        algorithm=None,
        training_episode=lambda sampling: None,
    )
    plan, prompt = training_plan(config), PromptSample(prompt_tokens=[1, 2], messages=[], position=4)  # type: ignore[arg-type]
    job = plan.baseline_job(prompt)
    assert job is not None
    assert job.n == 1
    assert job.episode.keywords["sampling"].temperature == 0  # type: ignore[attr-defined]
    engine = Engine(moment_s=0)
    batches = [asyncio.run(run_group(engine, one)) for one in (plan.job(prompt), job)]  # type: ignore[arg-type]
    assert [len(batch) for batch in batches] == [3, 1]
    assert len(set(engine.names)) == 4, "an engine knows requests by their name"
    grpo = SimpleNamespace(**{**vars(config), "needed_columns": frozenset()})
    assert training_plan(grpo).baseline_job(prompt) is None  # type: ignore[arg-type]

    made = bench(k=1, baseline=plan.baseline)
    samples = made.groups.take(1)
    scores, odd = samples.scores.result(), (samples.batch["group"][::2] % 2).tolist()
    assert scores["score"].tolist() == [score for group in odd for score in (1, group)]
    assert scores["baseline_score"].tolist() == [1.0] * 8


def test_samples_that_are_too_old_are_refused() -> None:
    columns = {"policy_version": torch.tensor([4, 3, 0]), "response_length": torch.tensor([5, 5, 0])}
    check_fresh(Batch(columns), step=5, max_staleness=1)  # nothing was generated of the last one
    with pytest.raises(EngineError, match=r"step 6 .* 2 versions old.*max_staleness is 1"):
        check_fresh(Batch(columns), step=6, max_staleness=1)


# --- settings -------------------------------------------------------------------------------------------------------

RAY = {"kind": "ray", "pools": {"train": {}, "gen": {}}, "placement": {"actor": "train", "rollout": "gen"}}


def config_of(**changes: Any) -> Any:
    values = {
        "model": {"path": "m"},
        "data": {"train_files": "t", "train_batch_size": 4},
        "reward": {"path": "r.py:f"},
        "trainer": {"out_dir": "o", "total_steps": 2},
        **changes,
    }
    return validate_config(GRPOConfig, values)


def test_the_section_is_called_async() -> None:
    config = config_of(controller=RAY, **{"async": {"max_staleness": 2}})
    assert config.asynchronous.max_staleness == 2
    assert config.model_dump(mode="json")["async"] == {"max_staleness": 2, "max_concurrent_groups": None}
    assert config_of().asynchronous.max_staleness == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"async.max_staleness: is 1, which needs .* controller.kind=ray"),
        (
            {"controller": {"kind": "ray"}},
            r"async.max_staleness: is 1, but the rollout shares the pool 'default' .*actor",
        ),
        (
            {"controller": {**RAY, "placement": {"actor": "train", "rollout": "train"}, "pools": {"train": {}}}},
            "shares",
        ),
    ],
)
def test_impossible_places_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**{"async": {"max_staleness": 1}, **changes})


def test_unknown_keys_and_useless_ones_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"async.max_stalenes: unknown key; did you mean async.max_staleness"):
        config_of(**{"async": {"max_stalenes": 1}})
    with pytest.raises(ConfigError, match=r"async.max_concurrent_groups: is for asynchronous training"):
        config_of(**{"async": {"max_concurrent_groups": 1}})
