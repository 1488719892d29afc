"""Traces as a viewer reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcore.controller import Event
from rlcore_recipes.run.trace_file import TraceFile

EPOCH = 1.7e9


def event(name: str, start: float, end: float, worker: str = "train[0]") -> Event:
    return Event(name, "part", worker, EPOCH + start, EPOCH + end)


def load(path: Path) -> list[dict[str, Any]]:
    """What is there, with or without the closing bracket."""
    text = path.read_text()
    records = json.loads(text if text.endswith("]\n") else text + "]")
    assert isinstance(records, list)
    return records


def slices(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["ph"] == "X"]


def names(records: list[dict[str, Any]], what: str) -> dict[tuple[int, int], str]:
    found = [record for record in records if record["name"] == f"{what}_name"]
    assert len({(record["pid"], record["tid"]) for record in found}) == len(found)
    return {(record["pid"], record["tid"]): record["args"]["name"] for record in found}


def test_a_track_per_process_with_complete_events_in_microseconds(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "new" / "trace.json")
    trace.append([event("step", 0, 2, "controller"), event("gen", 0.5, 1, "controller"), event("train", 1, 1.25)])
    records = load(tmp_path / "new" / "trace.json")
    assert all(record["ph"] in "XM" for record in records)
    processes = {pid: name for (pid, _), name in names(records, "process").items()}
    assert sorted(processes.values()) == ["controller", "train[0]"]
    threads = names(records, "thread")
    found = {record["name"]: record for record in slices(records)}
    assert found["train"]["dur"] == pytest.approx(250_000, abs=1)
    assert found["train"]["ts"] == pytest.approx((EPOCH + 1) * 1e6, abs=1)
    assert found["train"]["cat"] == "part"
    assert processes[found["train"]["pid"]] == "train[0]"
    assert (found["step"]["pid"], found["step"]["tid"]) == (found["gen"]["pid"], found["gen"]["tid"])
    assert threads[found["train"]["pid"], found["train"]["tid"]] == "train[0]"


def test_the_file_can_be_read_after_every_step_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = TraceFile(path)
    for step in range(3):
        trace.append([event(f"step {step}", step, step + 1)])
        assert [record["name"] for record in slices(load(path))] == [f"step {n}" for n in range(step + 1)]
        trace.append([])
    trace.close()
    assert len(slices(json.loads(path.read_text()))) == 3
    again = TraceFile(path)
    again.append([event("step 3", 3, 4)])
    again.close()
    assert [record["name"] for record in slices(json.loads(path.read_text()))] == [f"step {n}" for n in range(4)]


@given(cut=st.integers(0, 2000))
def test_a_run_that_was_killed_while_it_wrote_can_go_on(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    trace = TraceFile(path)
    trace.append([event(f"step {step}, \u00fc", step, step + 1) for step in range(5)])
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - cut, 0)])
    trace = TraceFile(path)
    trace.append([event("more", 9, 10)])
    trace.close()
    found = [record["name"] for record in slices(json.loads(path.read_text()))]
    assert found == [*(f"step {step}, \u00fc" for step in range(len(found) - 1)), "more"]


def test_a_run_without_events_leaves_an_empty_trace(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "trace.json")
    trace.close()
    assert json.loads((tmp_path / "trace.json").read_text()) == []


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), max_size=8), min_size=1, max_size=3
    )
)
def test_events_on_a_thread_stand_in_each_other_or_apart(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[list[int]]]
) -> None:
    """Viewers cannot show slices of one thread that stand across."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    trace = TraceFile(path)
    for step in steps:
        trace.append([event("x", start, end) for start, end in step])
    trace.close()
    records = json.loads(path.read_text())
    threads = names(records, "thread")
    by_thread: dict[Any, list[tuple[float, float]]] = {}
    for record in slices(records):
        by_thread.setdefault((record["pid"], record["tid"]), []).append((record["ts"], record["ts"] + record["dur"]))
    assert by_thread.keys() == threads.keys()
    assert sum(map(len, by_thread.values())) == sum(map(len, steps))
    for placed in by_thread.values():
        for number, (start, end) in enumerate(placed):
            for other_start, other_end in placed[:number]:
                apart = end <= other_start + 1 or other_end <= start + 1
                inside = other_start <= start + 1 and end <= other_end + 1
                around = start <= other_start + 1 and other_end <= end + 1
                assert apart or inside or around
