"""Trackers write what they are given, and never end a run."""

import io
import json
import math
import os
import re
import struct
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rlcore import plugins
from rlcore.errors import PluginError, RlcoreWarning
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers import Trackers, open_trackers
from rlcore_recipes.trackers.console import ConsoleTracker
from rlcore_recipes.trackers.settings import ConsoleSettings, JsonlSettings, TensorboardSettings, WandbSettings


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo(
        tmp_path, project="p", name="n", run_id="abc123", total_steps=10, config={"lr": 0.1, "nested": {"a": 1}}
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


# --- jsonl ----------------------------------------------------------------------------------------------------------


def jsonl(run: RunInfo) -> Tracker:
    return plugins.get("rlcore.trackers", "jsonl").build(JsonlSettings(), run)


def test_jsonl_writes_metrics_and_tables(run: RunInfo) -> None:
    tracker = jsonl(run)
    tracker.log({"loss": 0.5, "bad": math.nan, "worse": math.inf}, 1)
    tracker.log_table("val/generations", ["prompt", "score"], [["a\nü", 1.0], ["b", 0.0]], 1)
    [line] = lines(run.out_dir / "metrics.jsonl")
    assert {name: line[name] for name in line if name != "time"} == {"step": 1, "loss": 0.5, "bad": None, "worse": None}
    assert lines(run.out_dir / "tables" / "val-generations.jsonl") == [
        {"step": 1, "prompt": "a\nü", "score": 1.0},
        {"step": 1, "prompt": "b", "score": 0.0},
    ]


def test_jsonl_of_a_resumed_run_has_every_step_once(run: RunInfo) -> None:
    tracker = jsonl(run)
    for step in range(5):
        tracker.log({"loss": step}, step)
        tracker.log_table("t", ["x"], [[step]], step)
    with (run.out_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a crash
    tracker = jsonl(replace(run, start_step=2))
    tracker.log({"loss": 30}, 3)
    assert [(line["step"], line["loss"]) for line in lines(run.out_dir / "metrics.jsonl")] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 30),
    ]
    assert [line["step"] for line in lines(run.out_dir / "tables" / "t.jsonl")] == [0, 1, 2]
    jsonl(run)
    assert lines(run.out_dir / "metrics.jsonl") == []


def a_folder(path: Path) -> None:
    path.unlink()
    (path / "mine").mkdir(parents=True)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "bad byte": (lambda path: path.write_bytes(path.read_bytes() + b"\xff\n"), [1, 2], "line 4 is no JSON object"),
    "a list": (lambda path: path.write_bytes(b"[1]\n3\n" + path.read_bytes()), [1, 2], "line 1 is no JSON object"),
    "no step": (lambda path: path.write_bytes(path.read_bytes() + b"{}\n"), [1, 2], "line 4 is no JSON object"),
    "text": (lambda path: path.write_bytes(path.read_bytes() + b'{"step": "x"}\n'), [1, 2], "line 4 is no JSON"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), [], None),  # no line end: as a crash leaves it
    "zeros and more": (lambda path: path.write_bytes(bytes(1000) + b"\n"), [], "line 1 is no JSON object"),
    "folder": (a_folder, [], "is a folder"),
    "pipe": (a_pipe, [], "is not a regular file"),
}


@pytest.mark.parametrize(("damage", "kept", "reason"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["metrics.jsonl", "tables/t.jsonl"])
def test_a_damaged_file_is_moved_aside_and_metrics_go_on(
    run: RunInfo, damage: Callable[[Path], object], kept: list[int], reason: str | None, name: str
) -> None:
    tracker = jsonl(run)
    for step in (1, 2, 3):
        tracker.log({"loss": 1.0}, step)
        tracker.log_table("t", ["x"], [[step]], step)
    path = run.out_dir / name
    damage(path)
    with warnings.catch_warnings(record=True, action="always") as caught:
        trackers = open_trackers({}, replace(run, start_step=2))
    trackers.log({"loss": 2.0}, 3)
    trackers.log_table("t", ["x"], [["lone \ud800"]], 3)
    file = run.out_dir / "metrics.jsonl" if name == "metrics.jsonl" else run.out_dir / "tables" / "t.jsonl"
    assert [line["step"] for line in lines(file)] == [*kept, 3]
    if reason is None:
        assert not caught
        return
    [warning] = caught
    assert f"{path} is damaged ({reason}" in str(warning.message)
    assert os.path.lexists(f"{path}.damaged-1")


def test_a_file_in_place_of_the_tables(run: RunInfo) -> None:
    (run.out_dir / "tables").write_text("mine")
    with pytest.warns(UserWarning, match=r"tables is damaged \(it is no folder\); it is now tables.damaged-1"):
        tracker = jsonl(run)
    tracker.log_table("t", ["x"], [[1]], 1)
    assert (run.out_dir / "tables.damaged-1").read_text() == "mine"
    assert len(lines(run.out_dir / "tables" / "t.jsonl")) == 1


# --- console --------------------------------------------------------------------------------------------------------


def console(run: RunInfo, terminal: bool) -> tuple[ConsoleTracker, io.StringIO]:
    out = io.StringIO()
    screen = Console(file=out, force_terminal=terminal, width=100)
    return ConsoleTracker(ConsoleSettings(), run, screen), out


def test_console_without_a_terminal_prints_plain_lines(run: RunInfo) -> None:
    tracker, out = console(run, terminal=False)
    tracker.log({"val-core/gsm8k/reward/mean@1": 0.125}, 0)
    tracker.log({"critic/score/mean": 0.25, "actor/grad_norm": 1234.5678, "other": 1.0}, 1)
    tracker.log({"critic/score/mean": 0.5, "actor/grad_norm": 1e-7}, 2)
    tracker.log({"critic/score/mean": math.nan, "train/loss": 2.0}, 3)
    tracker.close()
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert rows[0] == ["step", "0", "val-core/gsm8k/reward/mean@1", "=", "0.125"]
    assert rows[1] == ["step", "score", "grad", "eta"]
    assert rows[2] == ["1/10", "0.25", "1234.6", "0:00:00"]
    assert rows[3][:3] == ["2/10", "0.5", "1e-07"]
    assert rows[4] == ["step", "loss", "score", "grad", "eta"]  # a new column: a new heading
    assert rows[5][:3] == ["3/10", "2", "nan"]
    assert "\x1b" not in out.getvalue()


def test_console_shows_failures_once_there_are_some(run: RunInfo) -> None:
    tracker, out = console(run, terminal=False)
    for step, ratio in enumerate((0.0, 0.25, 0.0), 1):
        tracker.log({"critic/score/mean": 0.5, "reward/error_ratio": ratio, "actor/skipped_steps": 0.0}, step)
    tracker.close()
    rows = [line.split()[:-1] for line in out.getvalue().splitlines()]
    assert rows[0] == ["step", "score"]
    assert rows[2:] == [["step", "score", "errors"], ["2/10", "0.5", "0.25"], ["3/10", "0.5", "0"]]


def test_console_without_a_terminal_prints_the_progress_of_long_steps(
    run: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, out = console(run, terminal=False)
    tracker.progress("completions generated", 1, 8, 1)
    assert out.getvalue() == ""  # too early
    monkeypatch.setattr("rlcore_recipes.trackers.console.QUIET_S", 0.0)
    Trackers({"console": tracker}).progress("completions generated", 3, 8, 1)
    assert out.getvalue() == "step 1/10: 3 of 8 completions generated\n"


def test_console_on_a_terminal_shows_the_progress_of_a_step(run: RunInfo) -> None:
    tracker, out = console(run, terminal=True)
    tracker.progress("completions generated", 3, 8, 1)
    tracker._progress.refresh()  # type: ignore[union-attr]
    assert "3/8 completions generated" in out.getvalue()
    tracker.log({"critic/score/mean": 0.5}, 1)
    tracker.close()
    assert "completions generated" not in out.getvalue().rpartition("\x1b[2K")[2]  # of what is drawn last


def test_console_on_a_terminal_shows_progress(run: RunInfo) -> None:
    tracker, out = console(replace(run, start_step=4), terminal=True)
    tracker.log({"critic/score/mean": 0.5}, 5)
    tracker.close()
    tracker.close()
    assert "5/10" in out.getvalue()
    assert "eta" in out.getvalue()


def test_console_repeats_its_heading(run: RunInfo) -> None:
    tracker, out = console(run, terminal=False)
    for step in range(1, 31):
        tracker.log({"train/loss": 1.0}, step)
    assert out.getvalue().count("loss") == 2


# --- wandb, tensorboard -----------------------------------------------------------------------------------------------


def wandb_records(folder: Path) -> list:
    """All records of the runs below ``folder``: protobuf messages in LevelDB's log format after 7 bytes of header."""
    from wandb.proto import wandb_internal_pb2

    block = 32768
    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, message = path.read_bytes(), 7, b""
        assert data.startswith(b":W&B") or not data  # not written yet
        while at + 7 <= len(data):
            if block - at % block < 7:  # too little room for a header is padded
                at += block - at % block
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            message += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                record = wandb_internal_pb2.Record()
                record.ParseFromString(message)
                records.append(record)
                message = b""
    return records


def wandb_history(records: list) -> list[dict]:
    found = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in items})
    return found


@pytest.mark.slow
def test_wandb_offline(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(run.out_dir / "netrc"))  # no account
    build = plugins.get("rlcore.trackers", "wandb").build
    with warnings.catch_warnings(record=True, action="always") as caught:
        for start in (0, 2):  # the second is the first one, resumed
            time.sleep(1.1 if start else 0)  # wandb names folders by the second
            monkeypatch.setenv("WANDB_MODE", "online" if start else "offline")
            tracker = build(WandbSettings(tags=["t"], mode="online" if start else None), replace(run, start_step=start))
            tracker.log({"actor/lr": 0.5}, start + 1)
            tracker.log_histogram("critic/advantages", [0.0, 0.5, 1.0], [3, 4], start + 1)
            tracker.log_table("val/generations", ["prompt"], [["hello"]], start + 2)
            tracker.log({"actor/lr": 0.25}, start + 2)
            tracker.close()
    [message] = [str(warning.message) for warning in caught if warning.category is RlcoreWarning]
    assert message.startswith("Weights & Biases cannot be reached (there is no API key; `wandb login` saves one)")
    deadline = time.monotonic() + 60
    while sum(record.WhichOneof("record_type") == "exit" for record in wandb_records(run.out_dir)) < 2:
        assert time.monotonic() < deadline, "wandb's own process did not finish its files"
        time.sleep(0.1)
    records = wandb_records(run.out_dir)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(item.run_id, item.project, item.display_name) for item in runs} == {("abc123", "p", "n")}
    assert {item.key: json.loads(item.value_json) for item in runs[0].config.update}["nested"] == {"a": 1}
    history = wandb_history(records)
    assert [(row["global_step"], row["actor/lr"]) for row in history if "actor/lr" in row] == [
        (1, 0.5),
        (2, 0.25),
        (3, 0.5),
        (4, 0.25),
    ]
    assert [row["_step"] for row in history] == [1, 2, 3, 4]
    assert history[0]["critic/advantages.values"] == [3, 4]
    assert history[0]["critic/advantages.bins"] == [0, 0.5, 1]
    tables = list(run.out_dir.glob("wandb/offline-run-*/files/media/table/val/*.json"))
    assert [json.loads(path.read_text()) for path in sorted(tables)] == [
        {"columns": ["step", "prompt"], "data": [[2, "hello"]]},
        {"columns": ["step", "prompt"], "data": [[4, "hello"]]},
    ]


def test_wandb_goes_by_its_own_id(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    plugins.get("rlcore.trackers", "wandb").build(WandbSettings(mode="offline"), run).close()
    assert [path.name for path in run.out_dir.glob("wandb/offline-run-*/*.wandb")] == ["run-mine.wandb"]


def test_tensorboard(run: RunInfo) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 1):
        tracker = plugins.get("rlcore.trackers", "tensorboard").build(
            TensorboardSettings(), replace(run, start_step=start)
        )
        for step in range(start + 1, start + 3):
            tracker.log({"loss": 10 * start + step}, step)
        tracker.log_table("val", ["a", "b"], [["x|y", "1\n2"]], start + 2)
        tracker.log_histogram("critic/advantages", [-1.0, 0.0, 2.0], [3, 4], start + 2)
        tracker.close()
    events = EventAccumulator(str(run.out_dir / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 12.0), (3, 13.0)]
    [event] = events.Histograms("critic/advantages")  # that of step 2 was repeated
    assert (event.step, event.histogram_value.num) == (3, 7)
    assert event.histogram_value.bucket == [3.0, 4.0]
    assert event.histogram_value.bucket_limit == [0.0, 2.0]
    text = events.Tensors("val/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text == "| a | b |\n| --- | --- |\n| x\\|y | 1<br>2 |"
    assert '"lr": 0.1' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "swanlab", "mlflow", "trackio"])
def test_missing_package_names_what_to_install(run: RunInfo, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    options = plugins.get("rlcore.trackers", name).config_class()()
    with pytest.raises(PluginError, match=rf"the tracker {name} needs .* pip install 'rlcore-recipes\[{name}\]'"):
        open_trackers({name: options}, run)


# --- fan-out --------------------------------------------------------------------------------------------------------


class Broken(Tracker):
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        raise ConnectionError("service is down")

    def close(self) -> None:
        raise RuntimeError("still down")


class Kept(Tracker):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.steps.append(step)


def test_a_failing_tracker_is_warned_about_once() -> None:
    kept = Kept()
    trackers = Trackers({"broken": Broken(), "kept": kept})
    with pytest.warns(UserWarning, match="tracker broken failed and may miss data: ConnectionError: service is down"):
        trackers.log({}, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.log({}, 2)
        trackers.log_table("t", [], [], 2)
        trackers.close()
    assert kept.steps == [1, 2]


def test_a_tracker_that_cannot_start_is_a_warning_and_jsonl_always_writes(
    run: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ConsoleTracker, *arguments: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(ConsoleTracker, "__init__", refuse)
    with pytest.warns(UserWarning, match="tracker console could not be started: ConnectionError: no network"):
        trackers = open_trackers({"console": ConsoleSettings()}, run)
    trackers.log({"a": 1.0}, 1)
    assert len(lines(run.out_dir / "metrics.jsonl")) == 1


def test_own_tracker_as_the_documentation_has_it(run: RunInfo, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "tracking.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]  # type: ignore[index]
    members: dict = {}
    exec(code, members)
    members["open_tracker"](members["Options"](), run).log({"loss": 1.0}, 3)
    assert capsys.readouterr().out == "3 {'loss': 1.0}\n"
    assert members["plugin"].factory == "my_package.tracker:open_tracker"
