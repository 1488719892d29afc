"""A tracker's thread keeps training from waiting, and the tracker's failures to itself."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from rlcore.errors import RlcoreWarning
from rlcore.tracking import Tracker
from rlcore_recipes.trackers import Trackers, background
from rlcore_recipes.trackers.background import BackgroundTracker


class Recording(Tracker):
    """Notes what it is called with; can be made to wait or to fail."""

    def __init__(self, before: Callable[[int], object] = lambda step: None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.threads = {threading.current_thread()}
        self._before = before

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.threads.add(threading.current_thread())
        self._before(step)
        self.calls.append(("log", step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self.calls.append((name, step))

    def log_histogram(self, name: str, edges: Sequence[float], counts: Sequence[int], step: int) -> None:
        self.calls.append((name, step))

    def close(self) -> None:
        self.calls.append(("close", 0))


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a hanging tracker waits for; opened at the end."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_calls_keep_their_order_and_are_made_by_one_other_thread() -> None:
    made: list[Recording] = []
    tracker = BackgroundTracker("t", lambda: made.append(Recording()) or made[0])
    tracker.log({}, 1)
    tracker.log_table("table", [], [], 1)
    tracker.log_histogram("histogram", [0.0, 1.0], [1], 1)
    tracker.log({}, 2)
    tracker.close()
    tracker.close()
    assert made[0].calls == [("log", 1), ("table", 1), ("histogram", 1), ("log", 2), ("close", 0)]
    assert len(made[0].threads) == 1
    assert threading.current_thread() not in made[0].threads


def test_a_tracker_that_cannot_start_is_warned_about_once_and_keeps_nothing() -> None:
    def build() -> Tracker:
        raise ConnectionError("no network")

    with warnings.catch_warnings(record=True, action="always") as caught:
        tracker = BackgroundTracker("t", build)
        tracker._thread.join()
    assert [str(warning.message) for warning in caught] == [
        "tracker t could not be started: ConnectionError: no network"
    ]
    with warnings.catch_warnings(action="error"):
        for step in range(3):
            tracker.log({}, step)
        tracker.close()
    assert not tracker._calls


def test_a_call_that_fails_is_warned_about_once_and_others_are_made() -> None:
    def refuse(step: int) -> None:
        if step < 3:
            raise KeyboardInterrupt("stopped in the dashboard")  # as SwanLab does

    recording = Recording(refuse)
    tracker = BackgroundTracker("t", lambda: recording)
    with warnings.catch_warnings(record=True, action="always") as caught:
        for step in (1, 2, 3):
            tracker.log({}, step)
        tracker.close()
    [warning] = caught
    assert "tracker t failed and may miss data: KeyboardInterrupt: stopped" in str(warning.message)
    assert recording.calls == [("log", 3), ("close", 0)]


def test_a_slow_tracker_loses_its_oldest_calls(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "BACKLOG", 2)
    started = threading.Event()

    def wait(step: int) -> None:
        started.set()
        gate.wait()

    recording = Recording(wait)
    tracker = BackgroundTracker("t", lambda: recording)
    tracker.log({}, 1)
    started.wait()
    with warnings.catch_warnings(record=True, action="always") as caught:
        for step in range(2, 7):
            tracker.log({}, step)
        gate.set()
        tracker.close()
    assert [str(warning.message) for warning in caught] == [
        "tracker t is too slow: 2 calls wait for it, so the oldest are dropped",
        "tracker t was too slow; 3 of its calls were dropped",
    ]
    assert recording.calls == [("log", 1), ("log", 5), ("log", 6), ("close", 0)]


@pytest.mark.parametrize("where", ["start", "call"])
def test_a_tracker_that_hangs_is_left_behind(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(background, "CLOSE_S", 0.1)

    def build() -> Tracker:
        if where == "start":
            gate.wait()
        return Recording(lambda step: gate.wait())

    tracker = BackgroundTracker("t", build)
    tracker.log({}, 1)
    tracker.log({}, 2)
    with pytest.warns(RlcoreWarning, match=r"tracker t did not finish within 0.1 s and misses the last [23] calls"):
        tracker.close()
    gate.set()
    tracker._thread.join(10)
    assert not tracker._thread.is_alive()


def test_trackers_that_hang_are_waited_for_together(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CLOSE_S", 0.5)
    hanging = {
        str(number): BackgroundTracker(str(number), lambda: Recording(lambda step: gate.wait())) for number in range(4)
    }
    trackers = Trackers(hanging)
    trackers.log({}, 1)
    started = time.monotonic()
    with warnings.catch_warnings(record=True, action="always") as caught:
        trackers.close()
    assert time.monotonic() - started < 1.5
    assert len(caught) == 4
