"""The loop around a step, with a model that is one number."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pydantic import Field

from rlcore.config import Config, FileName, dump_config, load_config
from rlcore.engines import ModelSettings, TrainEngine
from rlcore.errors import CheckpointError, ConfigError, DataError, RlcoreWarning, TrainingError
from rlcore.progress import report
from rlcore_kit.checkpoint.json_file import JsonFile
from rlcore_kit.checkpoint.rank_files import file_record
from rlcore_recipes.ranks import executor
from rlcore_recipes.run.folder import Replaced, check_free, write_config
from rlcore_recipes.run.loop import due, train
from rlcore_recipes.run.records import Records, Table
from rlcore_recipes.run.timing import Timings
from rlcore_recipes.run.trainable import Run, Validation
from rlcore_recipes.settings import TrainerSettings
from rlcore_recipes.trackers import Trackers


class Number(SimpleNamespace):
    """A model whose state is one float."""

    value: float
    dp_size = 1
    start_save = TrainEngine.start_save
    save_done = TrainEngine.save_done
    finish_save = TrainEngine.finish_save

    def save(self, path: Path) -> None:
        path.mkdir(parents=True)
        (path / "value").write_text(repr(self.value))

    def load(self, path: Path) -> None:
        self.value = float((path / "value").read_text())

    def save_pretrained(self, path: Path) -> None:
        path.mkdir(parents=True)
        (path / "weights").write_text(repr(self.value))


class Count(JsonFile):
    count: int = Field(ge=0)


class Counter(SimpleNamespace):
    count: int = 0
    described_by = Count

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


class RunConfig(Config):
    seed: int = 3
    trainer: TrainerSettings
    lr: float = 0.1


def make(tmp_path: Path, *keys: str, recipe: str = "number", steps: int = 4, parts: bool = True) -> tuple[Run, Number]:
    settings = [f"trainer.out_dir={tmp_path}", "trainer.trackers=[jsonl]", *(f"trainer.{key}" for key in keys)]
    config = load_config(RunConfig, None, settings)
    model, counter = Number(value=0.0), Counter()

    def step(number: int) -> dict[str, float]:
        counter.count += 1
        model.value += counter.count * random.random() + float(torch.rand(()))
        return {"loss": model.value, "perf/total_num_tokens": 10.0}

    validates = config.trainer.test_freq > 0
    check_free(config.trainer, config)
    session: Any = SimpleNamespace(
        config=config,
        executor=executor,
        total_steps=steps,
        timed=Timings(),
        records=Records(),
        max_error_ratio=1.0,
        max_invalid_ratio=1.0,
        engines={"actor": executor.workers(TrainEngine, model, "actor")},  # type: ignore[type-abstract]
        parts={"counter": counter} if parts else {},
        save_tokenizer=lambda folder: (folder / "tokenizer").write_text("words"),
        about=list,
    )
    validate = (lambda: Validation({"val/score": model.value}, ("text",), [["hi"]])) if validates else None
    return Run(recipe, session, step, validate), model


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_validation_and_checkpoints_come_when_due(tmp_path: Path) -> None:
    run, model = make(tmp_path, "test_freq=2", "save_freq=3", "save_hf=true", "log_val_generations=1", steps=5)
    train(run)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines(tmp_path) if "val/score" in line] == [0, 2, 4, 5]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000005"]
    assert float((tmp_path / "model" / "weights").read_text()) == model.value
    assert (tmp_path / "model" / "tokenizer").exists()
    assert len((tmp_path / "tables" / "val-generations.jsonl").read_text().splitlines()) == 4
    last = lines(tmp_path)[-1]
    assert last["training/global_step"] == 5
    assert last["perf/throughput"] > 0
    assert last["timing_s/step"] > 0
    assert last["timing_s/testing"] >= 0


def test_a_tokenizer_that_cannot_be_written_is_one_sentence_about_the_model(tmp_path: Path) -> None:
    run, _ = make(tmp_path, "save_hf=true", steps=1)

    def fail(folder: Path) -> None:
        raise ValueError("several\nlines")

    run.session.save_tokenizer = fail  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"^the model is in .*/model, but its tokenizer .* ValueError: lines$"):
        train(run)
    assert (tmp_path / "model" / "weights").exists()


@pytest.mark.parametrize(("every", "expected"), [(-1, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_due(every: int, expected: list[int]) -> None:
    assert [step for step in range(1, 6) if due(every, step, last=step == 5)] == expected


def test_resumed_run_draws_the_same_random_numbers(tmp_path: Path) -> None:
    whole, model = make(tmp_path / "whole", "save_freq=1")
    train(whole)
    first, _ = make(tmp_path / "parts", "save_freq=1", steps=2)
    train(first)
    random.seed(99)
    second, continued = make(tmp_path / "parts", "save_freq=1")
    train(second)
    assert continued.value == model.value
    assert [line["loss"] for line in lines(tmp_path / "parts")] == [line["loss"] for line in lines(tmp_path / "whole")]


@pytest.mark.slow
def test_a_resumed_run_continues_in_its_trackers_and_repeats_no_step_there(
    tmp_path: Path, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import trackio.sqlite_storage
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.copy(mlflow_store, tmp_path)
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path)
    keys = ("trackers=[tensorboard, mlflow, trackio]", "save_freq=2", "name=n")
    train(make(tmp_path, *keys, steps=3)[0])
    shutil.rmtree(tmp_path / "checkpoints" / "step-000003")  # as if the run had been killed before it was complete
    time.sleep(1.1)  # TensorBoard reads files of one second in the order of their numbers as text: 10 before 9
    train(make(tmp_path, *keys, steps=4)[0])
    expected = [(line["step"], pytest.approx(line["loss"])) for line in lines(tmp_path)]
    assert [step for step, _ in expected] == [1, 2, 3, 4]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("rlcore").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == expected
    assert {"python", "rlcore", "torch"} <= {name.removeprefix("version.") for name in run.data.tags}
    assert "system/cpu_percent" in run.data.metrics
    [found] = trackio.Api().runs("rlcore")
    logged = trackio.SQLiteStorage.get_logs("rlcore", found.name)
    assert [(line["step"], line["loss"]) for line in logged] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected

    train(make(tmp_path, "trackers=[mlflow]", "save_freq=2", "resume_tracking=false", "name=n", steps=5)[0])
    old, new = client.search_runs([run.info.experiment_id], order_by=["attributes.start_time"])
    assert old.info.run_id == run.info.run_id
    assert [point.step for point in client.get_metric_history(new.info.run_id, "loss")] == [5]


def test_what_a_step_records_goes_to_the_trackers_once(tmp_path: Path) -> None:
    run, _ = make(tmp_path, "trackers=[parquet]", steps=2)
    original = run.step

    def step(number: int) -> dict[str, float]:
        if number == 1:
            run.session.records.tables["rollouts"] = Table(["score"], [[0.5], [1.0]])
        return original(number)

    run.step = step
    train(run)
    [file] = (tmp_path / "tables" / "rollouts").iterdir()
    assert pq.read_table(file).to_pydict() == {"step": [1, 1], "score": [0.5, 1.0]}
    assert not run.session.records.tables


def test_finished_run_does_nothing_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make(tmp_path, "save_freq=1")[0])
    before = lines(tmp_path)
    again, model = make(tmp_path, "save_freq=1")
    train(again)
    assert lines(tmp_path) == before
    assert model.value == before[-1]["loss"]
    printed = capsys.readouterr().err
    assert f"the run in {tmp_path} is complete: step 4 was its last; raise trainer.total_epochs to train" in printed
    assert "continuing" not in printed


def test_checkpoints_of_other_recipes_and_parts_are_refused(tmp_path: Path) -> None:
    train(make(tmp_path, "save_freq=1", steps=1)[0])
    with pytest.raises(CheckpointError, match="of the recipe number, not other"):
        train(make(tmp_path, "save_freq=1", recipe="other")[0])
    with pytest.raises(CheckpointError, match="differ in counter"):
        train(make(tmp_path, "save_freq=1", parts=False)[0])


def test_what_is_in_the_way_of_a_checkpoint_stops_the_run_before_its_steps(tmp_path: Path) -> None:
    train(make(tmp_path, "save_freq=1", steps=2)[0])
    newest = tmp_path / "checkpoints" / "step-000002"
    (newest / "manifest.json").unlink()
    again, _ = make(tmp_path, "save_freq=1")
    with (
        pytest.warns(UserWarning, match="skipped a damaged checkpoint: .*has no manifest"),
        pytest.raises(CheckpointError, match=r"step-000002 exists but is not a checkpoint .*move it away"),
    ):
        train(again)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    newest.rename(tmp_path / "moved")
    train(make(tmp_path, "save_freq=1")[0])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_state_that_does_not_fit_is_passed_over(tmp_path: Path) -> None:
    """The whole way: a part's state out of its range, under checksums that fit."""
    train(make(tmp_path, "save_freq=1", steps=2)[0])
    folder = tmp_path / "checkpoints" / "step-000002"
    state = json.loads((folder / "state.json").read_text())
    state["parts"]["counter"]["count"] = -5
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = file_record(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"state\.json, parts\.counter is damaged: count: Input should be greater"):
        train(make(tmp_path, "save_freq=1", steps=3)[0])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_changed_settings_are_named_and_the_old_ones_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make(tmp_path, "save_freq=1", steps=1)[0])
    train(make(tmp_path, "save_freq=2", steps=2)[0])
    assert "other settings than before: trainer.save_freq" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "config-until-step-1.yaml").read_text())["trainer"]["save_freq"] == 1
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["save_freq"] == 2


def test_interrupt_stops_after_the_step_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make(tmp_path, "save_freq=100")
    plain = run.step

    def interrupted(number: int) -> dict[str, float]:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(number)

    run.step = interrupted
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        train(run)
    assert stop.value.code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert "stopped after step 2 of 4; run the same command again to continue" in capsys.readouterr().err
    train(make(tmp_path, "save_freq=100")[0])
    assert [line["step"] for line in lines(tmp_path)][-3:] == [2, 3, 4]


def test_best_checkpoint_is_kept_and_an_unknown_metric_named(tmp_path: Path) -> None:
    keys = ("save_freq=1", "test_freq=1", "keep_checkpoints=1")
    train(make(tmp_path / "best", *keys, "best_metric=val/score", "best_mode=min")[0])
    names = sorted(path.name for path in (tmp_path / "best" / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000004"]
    with pytest.raises(ConfigError, match=r"trainer\.best_metric=val/scor .*did you mean val/score"):
        train(make(tmp_path / "typo", *keys, "best_metric=val/scor")[0])


def test_a_folder_with_foreign_files_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    train(make(tmp_path, "resume=never", steps=1)[0])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="holds a run already"):
        make(tmp_path, "resume=never")


def test_a_run_without_checkpoints_starts_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it was, or corrected; what the attempt before left is kept then. A model of it is never replaced."""
    train(make(tmp_path, steps=1)[0])
    train(make(tmp_path, steps=1)[0])
    assert "other settings" not in capsys.readouterr().err
    for number, name in enumerate(["second", "third"], 1):
        train(make(tmp_path, f"project={name}", steps=number + 1)[0])
        kept = tmp_path / f"attempt-{number}"
        assert f"with other settings than before: trainer.project; the metrics of the run before are in {kept}" in (
            capsys.readouterr().err
        )
        assert len(lines(kept)) == number
        assert sorted(path.name for path in kept.iterdir()) == ["config.yaml", "metrics.jsonl", "tables"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"another run that is complete, .*differ: trainer.project\)"):
        make(tmp_path, "project=fourth")


UNREADABLE = {
    "bad byte": b"seed: \xff",
    "control character": b"seed: \x01",
    "list": b"[1, 2]",
    "aliases": b"a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "recursive": b"a: &a [*a]\n",
    "nothing": b"",
    "timestamp": b"a: !!timestamp x\n",
    "python": b"a: !!python/object/apply:os.getcwd []\n",
    "deep": b"[" * 2000,
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_a_damaged_configuration_of_before_does_not_stop_the_run(tmp_path: Path, content: bytes) -> None:
    train(make(tmp_path, "save_freq=1", steps=1)[0])
    (tmp_path / "config.yaml").write_bytes(content)
    train(make(tmp_path, "save_freq=1", steps=2)[0])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert (tmp_path / "config-until-step-1.yaml").read_bytes() == content
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 0.1


def test_of_many_changed_keys_the_first_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make(tmp_path, "save_freq=1", steps=1)[0])
    (tmp_path / "config.yaml").write_text("a: 1\n")
    train(make(tmp_path, "save_freq=1", steps=2)[0])
    [line] = [line for line in capsys.readouterr().err.splitlines() if "other settings" in line]
    assert re.search(r"than before: a, (\S+, ){8}\S+ and \d+ more$", line)


@pytest.mark.parametrize("make_other", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_something_else_than_a_configuration_of_before(tmp_path: Path, make_other: Any) -> None:
    train(make(tmp_path, "save_freq=1", steps=1)[0])
    (tmp_path / "config.yaml").unlink()
    make_other(tmp_path / "config.yaml")
    train(make(tmp_path, "save_freq=1", steps=2)[0])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


class WithModel(RunConfig):
    model: ModelSettings
    files: list[FileName] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (["model.path={out}/model", "trainer.save_hf=true"], r"model.path=.* with trainer.save_hf"),
        (["model.path=elsewhere", "model.tokenizer_path={out}/../out/model", "trainer.save_hf=true"], "tokenizer_path"),
        (["model.path={out}/model"], None),
        (["model.path={out}", "trainer.save_hf=true"], None),
        (["model.path=x", "files=[elsewhere, '{out}/tables/val.jsonl']"], "files=.* is where the run would write"),
        (["model.path=x", "files={out}/metrics.jsonl"], "files=.* is where the run would write"),
    ],
)
def test_a_run_does_not_write_over_what_it_reads(tmp_path: Path, keys: list[str], reason: str | None) -> None:
    out = tmp_path / "out"
    config = load_config(WithModel, None, [f"trainer.out_dir={out}", *(key.format(out=out) for key in keys)])
    for name in ("model", "tables"):
        (out / name).mkdir(parents=True)
    for name in ("model/config.json", "tables/val.jsonl", "metrics.jsonl"):
        (out / name).touch()
    (out / "config.yaml").write_text(dump_config(config))
    if reason is None:
        check_free(config.trainer, config)
    else:
        with pytest.raises(ConfigError, match=reason):
            check_free(config.trainer, config)


def test_a_model_that_no_run_wrote_is_not_exported_over(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    make(tmp_path, "save_hf=true")
    (tmp_path / "model" / "model.safetensors").touch()
    make(tmp_path)
    with pytest.raises(ConfigError, match=r"model, where trainer\.save_hf would write, is there already"):
        make(tmp_path, "save_hf=true")


def test_a_run_that_failed_before_its_first_step_may_start_again_corrected(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    train(make(tmp_path, steps=1)[0])
    assert (tmp_path / "config-until-step-0.yaml").read_text() == "seed: 7\n"


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        *(
            (
                [f"trainer.out_dir={url}"],
                r"out_dir: must be a folder .*, not a URL; trainer\.checkpoint_dir",
            )
            for url in ("s3://bucket/a", "file:///tmp/a", "gs://bucket", "hf://datasets/x")
        ),
        (["trainer.out_dir=~no-such-user/x"], "out_dir: there is no home folder ~no-such-user"),
        (["trainer.out_dir=x", "trainer.checkpoint_dir=memory://x"], "checkpoint_dir: memory:// ends with the process"),
        (["trainer.out_dir=x", "trainer.checkpoint_dir=~no-such-user/x"], "checkpoint_dir: there is no home"),
        (["trainer.out_dir=x", "trainer.resume=~no-such-user/x"], "resume: there is no home"),
    ],
)
def test_places_that_are_none(keys: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(RunConfig, None, keys)


def test_out_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        make(tmp_path / "file")


def test_configuration_is_written_once(tmp_path: Path) -> None:
    config = load_config(RunConfig, None, [f"trainer.out_dir={tmp_path}"])
    assert write_config(tmp_path, config, 0) == Replaced()
    assert write_config(tmp_path, config, 5) == Replaced()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def faulty(tmp_path: Path, metrics: Mapping[str, list[float]], *keys: str, steps: int = 20) -> tuple[Run, int]:
    """A run whose steps have ``metrics``, the last of each for ever; and the steps that it made before it ended."""
    run, _ = make(tmp_path, *keys, steps=steps)
    plain, run.session.max_error_ratio, made = run.step, 0.5, 0  # type: ignore[misc]

    def step(number: int) -> dict[str, float]:
        nonlocal made
        made = number
        return plain(number) | {name: values[min(number, len(values)) - 1] for name, values in metrics.items()}

    run.step = step
    train(run)
    return run, made


@pytest.mark.filterwarnings("ignore::rlcore.errors.RlcoreWarning")
@pytest.mark.parametrize(
    ("metrics", "keys", "steps", "ended", "message"),
    [
        ({"reward/error_ratio": [0.0, 0.0, 1.0]}, [], 20, 5, "failed on 60% of the samples of the last 5 steps"),
        ({"reward/error_ratio": [0.0, 0.0, 1.0]}, [], 3, None, "failed on 100% of the samples of a step"),
        ({"reward/error_ratio": [1.0]}, [], 2, 2, "failed on 100% of the samples of the last 2 steps"),
        ({"reward/error_ratio": [0.5]}, [], 8, None, None),
        ({"actor/skipped_steps": [0.0, 1.0]}, ["max_skipped_steps=3"], 20, 4, "skipped in each of the last 3 steps"),
        ({"train/skipped_steps": [1.0]}, [], 2, 2, "skipped in each of the last 2 steps"),
        ({"critic/skipped_steps": [1.0, 0.0] * 9}, ["max_skipped_steps=2"], 6, None, "norm is not finite (critic)"),
        ({"actor/skipped_steps": [1.0]}, ["max_skipped_steps=null"], 6, None, None),
        ({"val-aux/reward_error_ratio": [1.0]}, [], 2, None, "failed on 100% of the samples of a validation"),
        ({}, ["grace_s=1e-9"], 2, None, "longer than trainer.grace_s=1e-09"),
    ],
)
def test_runs_that_learn_nothing_end(
    tmp_path: Path,
    metrics: dict[str, list[float]],
    keys: list[str],
    steps: int,
    ended: int | None,
    message: str | None,
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if ended is None:
            assert faulty(tmp_path, metrics, "save_freq=1", *keys, steps=steps)[1] == steps
        else:
            with pytest.raises(TrainingError, match=re.escape(message or "")):
                faulty(tmp_path, metrics, "save_freq=1", *keys, steps=steps)
            assert [line["step"] for line in lines(tmp_path)] == list(range(1, ended + 1))
            assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) == f"step-{ended - 1:06d}"
    said = [str(warning.message) for warning in caught if issubclass(warning.category, RlcoreWarning)]
    assert len(said) == (message is not None)
    assert ended is not None or message is None or message in said[0]
    if ended is not None:  # the same command does not find a run that is complete
        with pytest.raises(TrainingError):
            faulty(tmp_path, metrics, "save_freq=1", *keys, steps=steps)


@pytest.mark.parametrize(
    ("keys", "writes", "ends"),
    [
        ([], "no checkpoint and no model (trainer.save_freq=-1", "neither a model nor a checkpoint was saved"),
        (["save_freq=1"], "checkpoints every step in {}/checkpoints", "with trainer.save_hf=true to write {}/model"),
        (["save_freq=2", "save_hf=true"], "every 2 steps in {}/checkpoints, the model in", "the model is in {}/model"),
    ],
)
def test_a_run_says_what_it_is_and_where_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: list[str], writes: str, ends: str
) -> None:
    run, _ = make(tmp_path, *keys)
    run.session.about = lambda: [("model", "a number")]  # type: ignore[method-assign]
    train(run)
    start, end = capsys.readouterr().err.split("finished after step 4: ")
    assert start.startswith("number\n  model   a number\n  steps   4\n  writes  metrics in")
    assert writes.format(tmp_path) in start
    assert end.startswith(f"metrics are in {tmp_path}/metrics.jsonl")
    assert ends.format(tmp_path) in end


def test_trackers_hear_how_far_a_step_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(Trackers, "progress", lambda self, *args: heard.append(args))
    run, _ = make(tmp_path, "test_freq=2", steps=2)
    plain, validate = run.step, run.validate
    assert validate is not None

    def step(number: int) -> dict[str, float]:
        report("things done", number, 9)
        return plain(number)

    run.step = step
    run.validate = lambda: (report("things validated", 1, 1), validate())[1]
    train(run)
    report("things done", 9, 9)  # nothing listens any more
    validated = ("things validated", 1, 1)
    assert heard == [(*validated, 0), ("things done", 1, 9, 1), ("things done", 2, 9, 2), (*validated, 2)]
