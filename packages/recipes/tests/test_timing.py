"""Seconds of the parts of a step, with other processes at work."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcore.controller import Event, Executor
from rlcore.errors import ConfigError
from rlcore_recipes.run import timing
from rlcore_recipes.run.timing import Timings, covered


class Clock:
    """Both clocks of `time`, turned by hand."""

    def __init__(self) -> None:
        self.now = 1.7e9

    def time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now - 1.6e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


class Workers:
    """An executor as far as timing is concerned."""

    def __init__(self) -> None:
        self.label = ""
        self.events: list[Event] = []

    @contextmanager
    def trace_label(self, label: str) -> Iterator[None]:
        before, self.label = self.label, label
        yield
        self.label = before

    def timeline(self) -> list[Event]:
        taken, self.events = self.events, []
        return taken

    def work(self, start: float, end: float, worker: str = "train[0]") -> Event:
        return Event("work", self.label, worker, start, end)


def timings(workers: Workers, **options: Any) -> Timings:
    return Timings(cast(Executor, workers), **options)


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def test_alone_parts_take_what_passes_inside(clock: Clock) -> None:
    timed = Timings()
    with timed("step"):
        with timed("gen"):
            clock.now += 2
        clock.now += 1
        with timed("gen"):
            clock.now += 0.5
    assert round(timed.seconds("step"), 3) == 3.5
    assert round(timed.seconds("gen"), 3) == 2.5
    assert timed.seconds("nothing") == 0
    assert rounded(timed.take()) == {"step": 3.5, "gen": 2.5}
    assert timed.take() == {}


def test_a_part_that_fails_took_its_time(clock: Clock) -> None:
    timed = Timings()

    def fail() -> None:
        with timed("gen"):
            clock.now += 2
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert rounded(timed.take()) == {"gen": 2}


def test_work_of_others_belongs_to_the_part_that_asked_for_it(clock: Clock) -> None:
    """The controller asks and goes on; both ranks work on it together, and with ref and values side by side."""
    workers = Workers()
    timed, start = timings(workers), clock.now
    with timed("step"):
        with timed("ref"):
            clock.now += 0.1
            workers.events += [workers.work(start + 0.1, start + 2), workers.work(start + 0.1, start + 3, "train[1]")]
        with timed("values"):
            clock.now += 0.1
            workers.events += [workers.work(start + 0.2, start + 4, "critic[0]")]
        with timed.label("reward"):
            workers.events += [workers.work(start + 1, start + 1.5), workers.work(start + 3, start + 3.25)]
        clock.now = start + 4.5
    workers.events += [workers.work(start, start + 9)]  # of no part
    assert rounded(timed.take()) == {"step": 4.5, "ref": 3, "values": 3.9, "reward": 0.75}


def test_work_that_ends_later_counts_then_for_its_own_time(clock: Clock) -> None:
    workers = Workers()
    timed, start = timings(workers), clock.now
    with timed("ref"):
        clock.now += 0.5
        late = workers.work(start, start + 2)
    assert rounded(timed.take()) == {"ref": 0.5}
    clock.now = start + 100
    with timed("ref"):
        clock.now += 0.5
        workers.events += [late, workers.work(start + 100.25, start + 101)]
    assert rounded(timed.take()) == {"ref": 3}  # not the hundred seconds between


intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted), max_size=10)


@given(intervals)
def test_covered_counts_every_moment_once(spans: list[list[int]]) -> None:
    moments = {moment for start, end in spans for moment in range(start, end)}
    assert covered(Event("x", "x", "w", start, end) for start, end in spans) == len(moments)


def test_everything_is_recorded_once_and_nothing_is_kept(clock: Clock, tmp_path: Path) -> None:
    recorded: list[Event] = []
    workers = Workers()
    timed = timings(workers, record=recorded.extend)
    for _ in range(2):
        with timed("gen"):
            workers.events += [workers.work(clock.now, clock.now + 1)]
            clock.now += 1
        timed.take()
    timed.take()
    assert [(event.name, event.worker) for event in recorded] == [("gen", "controller"), ("work", "train[0]")] * 2
    assert timed._events == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.write_text('{"mine": 1}'), "is there already and is no trace"),
    ],
)
def test_something_else_than_a_trace_stays(tmp_path: Path, make: Any, reason: str) -> None:
    make(tmp_path / "trace.json")
    with ExitStack() as stack, pytest.raises(ConfigError, match=f"move away what is there: .*{reason}"):
        timing.open_trace(tmp_path, stack)
    if (tmp_path / "trace.json").is_file():
        assert (tmp_path / "trace.json").read_text() == '{"mine": 1}'


def test_a_damaged_trace_is_cut(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("[\n" + "[" * 50_000)
    with ExitStack() as stack:
        timing.open_trace(tmp_path, stack)
    assert json.loads((tmp_path / "trace.json").read_text()) == []


def test_the_trace_of_a_run_is_complete_when_it_ends(clock: Clock, tmp_path: Path) -> None:
    with ExitStack() as stack:
        timed = Timings(None, timing.open_trace(tmp_path, stack))
        with timed("gen"):
            clock.now += 1
        timed.take()
        assert '"gen"' in (tmp_path / "trace.json").read_text()
    assert (tmp_path / "trace.json").read_text().endswith("]\n")
