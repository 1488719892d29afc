"""When a run is started again, how often, after which wait, and from where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlcore.config import Config
from rlcore.errors import ConfigError, PlacementError, RestartsExhausted, WorkerDied, WorkerError
from rlcore_recipes.run import restarts
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.settings import ControllerSettings, TrainerSettings


class Settings(Config):
    trainer: TrainerSettings
    controller: ControllerSettings


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every wait; none is waited."""
    waited: list[float] = []
    monkeypatch.setattr(restarts.time, "sleep", waited.append)
    return waited


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Settings]:
    def make(resume: str = "auto", save_freq: int = 10, **controller: Any) -> Settings:
        return Settings(
            trainer=TrainerSettings(out_dir=tmp_path / "out", resume=resume, save_freq=save_freq),
            controller=ControllerSettings(kind="ray", **controller),
        )

    return make


class Run:
    """Does one thing after the other: raises an exception, or saves the checkpoint of a step and then dies."""

    def __init__(self, *events: Exception | int | None) -> None:
        self.events = list(events)
        self.resumed: list[str] = []

    def __call__(self, config: Settings) -> None:
        self.resumed.append(config.trainer.resume)
        event = self.events.pop(0)
        if isinstance(event, int):
            (Path(config.trainer.checkpoint_root) / f"step-{event:06d}").mkdir(parents=True)
            event = died()
        if event is not None:
            raise event


def died(why: str = "actor.train on train[1] (process 7) is gone: killed") -> WorkerDied:
    return WorkerDied(f"{why}\nand more")


def test_continues_from_its_own_checkpoints_and_counts_restarts_from_zero_after_each(
    config: Callable[..., Settings], waits: list[float], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = Run(died(), died(), 10, died(), died(), 20, None)
    restarting(run)(config(resume="never", max_restarts=3, restart_backoff_s=2))
    assert run.resumed == ["never", "never", "never", "auto", "auto", "auto", "auto"]
    assert waits == [2, 4, 2, 4, 8, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "restart 1 of 3 in 2 s, from the beginning: actor.train on train[1] (process 7) is gone: killed"
    )
    assert lines[2].startswith(f"restart 1 of 3 in 2 s, from {tmp_path}/out/checkpoints/step-000010: ")
    assert len(lines) == 6


def test_waits_five_minutes_at_most(config: Callable[..., Settings], waits: list[float]) -> None:
    restarting(Run(*[died()] * 4, None))(config(max_restarts=4, restart_backoff_s=100))
    assert waits == [100, 200, 300, 300]


def test_gives_up(config: Callable[..., Settings], waits: list[float], tmp_path: Path) -> None:
    with pytest.raises(RestartsExhausted) as raised:
        restarting(Run(10, died(), died()))(config(max_restarts=2))
    assert str(raised.value) == (
        "gave up after 2 restarts without a new checkpoint in between (controller.max_restarts=2): "
        "actor.train on train[1] (process 7) is gone: killed\n"
        f"run the same command again to continue from {tmp_path}/out/checkpoints/step-000010"
    )
    assert len(waits) == 2


def test_is_not_restarted_where_that_is_off(config: Callable[..., Settings], waits: list[float]) -> None:
    with pytest.raises(RestartsExhausted, match=r"the run is not restarted \(controller.max_restarts=0\).*\n.*is -1$"):
        restarting(Run(died()))(config(max_restarts=0, save_freq=-1))
    assert waits == []


def test_room_may_be_missing_for_a_while_but_not_from_the_start(
    config: Callable[..., Settings], waits: list[float]
) -> None:
    missing = PlacementError("the pools cannot be placed")
    run = Run(died(), missing, missing, None)
    restarting(run)(config(max_restarts=3))
    assert len(waits) == 3
    with pytest.raises(PlacementError):
        restarting(Run(missing))(config())


@pytest.mark.parametrize("error", [WorkerError("a bug"), ConfigError("wrong"), KeyboardInterrupt(), ValueError("x")])
def test_other_failures_end_the_run(config: Callable[..., Settings], waits: list[float], error: BaseException) -> None:
    with pytest.raises(type(error)):
        restarting(Run(error))(config())  # type: ignore[arg-type]
    assert waits == []


def test_refuses_the_folder_of_another_run(config: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").touch()
    run = Run(None)
    with pytest.raises(ConfigError, match="holds a run already"):
        restarting(run)(config(resume="never"))
    assert run.resumed == []
