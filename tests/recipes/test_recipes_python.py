"""`rlcore.train` and `rlcore.open_run`: the runs of the command line, from Python objects, in scripts and notebooks."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rlcore
from rlcore import plugins
from rlcore.engines import TrainEngine
from rlcore.errors import DataError, RlcoreError
from rlcore_recipes.grpo import GRPOConfig
from rlcore_recipes.python.reward_objects import reward_argument
from rlcore_recipes.sft import SFTConfig

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

KEYS: Mapping[str, Any] = {
    "data.train_batch_size": 4,
    "data.max_prompt_length": 32,
    "data.max_response_length": 8,
    "rollout.n": 2,
    "reward.workers": 1,
    "trainer.total_steps": 2,
    "trainer.trackers": ["jsonl"],
}


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": f"say {n}"}], "ground_truth": "7", "data_source": "letters"}
        for n in range(count)
    ]


def length(solution_str: str, **_: Any) -> float:
    return len(solution_str) / 10


def closure() -> Callable[..., float]:
    letters = set("abcdefghijklmnopqrstuvwxyz")

    def lower(solution_str: str, data_source: str, **_: Any) -> float:
        return sum(char in letters for char in solution_str) / 8

    return lower


def untimed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that every run of the same steps has."""
    varying = ("time", "perf/", "timing", "system/")
    return {name: value for name, value in metrics.items() if value is not None and not name.startswith(varying)}


@pytest.fixture
def train(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., rlcore.TrainingRun]:
    """`rlcore.train` with the task's model, in a folder without anything."""
    monkeypatch.chdir(tmp_path)

    def call(recipe: str = "grpo", overrides: Mapping[str, Any] = KEYS, **given: Any) -> rlcore.TrainingRun:
        return rlcore.train(recipe, **{"model": task.model, "overrides": overrides, **given})

    return call


def test_objects_train_as_files_do(train: Any, task: Any, tmp_path: Path, metrics_of: Any) -> None:
    run = train(data=rows(8), val_data=pa.Table.from_pylist(rows(2)), reward=closure())
    assert run.out_dir.parent == Path("runs")
    assert run.complete
    assert run.model_path is not None
    assert (run.model_path / "tokenizer_config.json").is_file()
    assert [Path(path).name for path in run.checkpoints] == ["step-000002"]
    assert run.config["trainer"]["test_freq"] == 10
    before, first, second, after = ["validation"] * 2, ["train"] * 8, ["train"] * 8, ["validation"] * 2
    assert run.rollouts["split"].to_pylist() == [*before, *first, *second, *after]
    assert run.rollouts["step"].to_pylist() == [0] * 2 + [1] * 8 + [2] * 10
    assert set(run.rollouts["data_source"].to_pylist()) == {"letters"}
    assert rlcore.open_run(str(run.out_dir)) == run
    assert "metrics" not in repr(run)

    files = {"train": rows(8), "test": rows(2)}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "my.py").write_text(
        "def lower(solution_str, **_):\n    return sum(c.isascii() and c.islower() for c in solution_str) / 8\n"
    )
    keys = {"data.train_files": "train.jsonl", "data.val_files": "test.jsonl", "reward.path": "my.py:lower"}
    result = task.run("grpo", Path("cli"), {**KEYS, **keys, "trainer.trackers": "[jsonl]", "trainer.test_freq": 10})
    assert result.exit_code == 0, result.output
    for ours, theirs in zip(run.metrics.to_pylist(), metrics_of(Path("cli")), strict=True):
        assert untimed(ours) == untimed(theirs)
    opened = rlcore.open_run("cli")
    assert opened.complete
    assert opened.model_path is None


def test_several_rewards_are_added_and_a_run_continues_with_its_objects(train: Any, capfd: Any) -> None:
    async def half(solution_str: str, **_: Any) -> float:
        return 0.5

    def several(completions: list[Any], **columns: list[Any]) -> list[float]:
        return [0.25] * len(completions)  # as TRL's

    rewards = [(closure(), 2.0), half, length, (several, 2), (partial(length, data_source="other"), -1), ("gsm8k", 0)]
    given = {"data": rows(8), "reward": rewards, "out_dir": "mine"}
    first = train(**given)
    assert first.config["reward"]["combine"]["rewards"][2]["function"]["path"].endswith("reward-2.pickle:length")
    means = {name: first.metrics[f"reward/{name}/score"] for name in ("lower", "half", "length", "length_2")}
    assert means["half"].to_pylist() == [0.5, 0.5]
    assert means["length"].to_pylist() == means["length_2"].to_pylist()
    for total, lower in zip(first.metrics["critic/score/mean"].to_pylist(), means["lower"].to_pylist()):
        assert total == pytest.approx(2 * lower + 0.5 + 2 * 0.25)

    assert train(**given) == first  # complete
    longer = train(**given, overrides={**KEYS, "trainer.total_steps": 3})
    assert longer.metrics["step"].to_pylist() == [1, 2, 3]
    assert longer.complete
    assert "continuing after step 2" in capfd.readouterr().err
    with pytest.raises(RlcoreError, match="holds others"):
        train(
            **{**given, "data": [{**row, "ground_truth": "8"} for row in rows(8)]},
            overrides={**KEYS, "trainer.total_steps": 4},
        )


def test_interrupt_leaves_a_checkpoint_from_which_the_same_call_continues(train: Any) -> None:
    trainers = [os.getpid()]

    def interrupting(solution_str: str, **_: Any) -> float:
        while trainers:  # once: the second interrupt is immediate
            os.kill(trainers.pop(), signal.SIGINT)
        return 0.0

    def models() -> list[object]:
        return [found for found in gc.get_objects() if issubclass(type(found), TrainEngine)]

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(rlcore.TrainingInterrupted, match=r"after step 1; .* again with out_dir='a'") as interrupt:
        train(data=rows(1), reward=interrupting, out_dir="a", overrides={**KEYS, "data.train_batch_size": 1})
    assert signal.getsignal(signal.SIGINT) is handler
    assert models() == []  # although the error is kept, as a notebook keeps it
    run = interrupt.value.run
    assert (run.complete, run.model_path, len(run.checkpoints)) == (False, None, 1)
    run = train(data=rows(1), reward=length, out_dir="a", overrides={**KEYS, "data.train_batch_size": 1})
    assert run.complete
    assert run.metrics["step"].to_pylist() == [1, 2]


def test_other_recipes_and_configuration_objects(train: Any, task: Any) -> None:
    data = [{"prompt": f"say {n}", "response": "abc", "data_source": "letters"} for n in range(4)]
    sizes = {"data.train_batch_size": 2, "trainer.total_steps": 1, "trainer.trackers": ["jsonl"]}
    frame = pd.DataFrame(data, index=range(2, 6))
    run = train("sft", data=datasets.Dataset.from_list(data).select([3, 2, 1, 0]), val_data=frame, overrides=sizes)
    assert pq.read_table(run.out_dir / "inputs/data.parquet").to_pylist() == data[::-1]
    assert pq.read_table(run.out_dir / "inputs/val_data.parquet").to_pylist() == data
    assert run.complete
    assert run.metrics.column("val/loss").null_count == 0
    config = GRPOConfig(
        model={"path": str(task.model)},
        data={"train_files": str(task.train), "train_batch_size": 4, "max_prompt_length": 32, "max_response_length": 8},
        reward={"name": "gsm8k", "max_error_ratio": 1},
        rollout={"n": 2},
        trainer={"out_dir": "configured", "total_steps": 1, "save_hf": False, "trackers": ["jsonl"]},
    )
    run = rlcore.train("grpo", config=config, reward=[closure(), "gsm8k"], overrides={"reward": {"workers": 1}})
    assert run.out_dir == Path("configured")
    assert run.model_path is None
    assert run.config["reward"]["max_error_ratio"] == 1
    assert run.config["data"]["train_files"] == [str(task.train)]
    again = rlcore.train("grpo", config=run.config, overrides={"trainer.out_dir": "copied"})
    assert untimed(again.metrics.to_pylist()[0]) == untimed(run.metrics.to_pylist()[0])


RECIPE = """
from rlcore.plugins import Plugin
from rlcore_recipes.grpo import step
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.settings import RLConfig

class ConciseConfig(RLConfig):
    coefficient: float = 0.0

@restarting
def run(config):
    train_rl("concise", config, lambda session, number: step(session, number) | {"actor/coeff": config.coefficient})

recipe = Plugin(interface=1, config="concise:ConciseConfig", factory="concise:run")
"""


def test_recipe_of_another_package(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "concise.py").write_text(RECIPE)
    (tmp_path / "concise-1.dist-info").mkdir()
    (tmp_path / "concise-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: concise\nVersion: 1\n")
    (tmp_path / "concise-1.dist-info/entry_points.txt").write_text("[rlcore.recipes]\nconcise = concise:recipe\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_points", plugins._points.__wrapped__)
    run = train("concise", data=rows(4), reward=closure(), overrides={**KEYS, "coefficient": 0.5})
    assert run.complete
    assert run.metrics["actor/coeff"].to_pylist() == [0.5, 0.5]


def test_closure_reaches_the_processes_of_ray(cluster: None, train: Any) -> None:
    run = train(data=rows(4), reward=closure(), overrides={**KEYS, "controller.kind": "ray", "trainer.total_steps": 1})
    assert run.complete
    assert run.metrics["reward/error_ratio"].to_pylist() == [0.0]
    assert run.metrics["critic/score/max"].to_pylist()[0] > 0


def unpicklable(lock: threading.Lock) -> Callable[..., float]:
    def locked(solution_str: str) -> float:
        with lock:
            return 0.0

    return locked


MISTAKES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "no reward": ({"reward": None}, r"rlcore.train\('grpo', …\) needs reward= \(or the key reward.name\)$"),
    "section": ({"overrides": {"trainer": 3}}, r"trainer: must be a mapping of keys, not 3  \(overrides\)"),
    "signature": ({"reward": lambda a, b: 0.0}, r"reward function lambda: it must take .*solution_str.*"),
    "unpicklable": ({"reward": unpicklable(threading.Lock())}, r"the reward locked cannot .* to lock, a lock\); make"),
    "number": ({"reward": 3}, "reward= must be a function, .* not a int"),
    "weight": ({"reward": [(length, "1")]}, r"reward\[0\] must be a reward or a pair"),
    "empty rewards": ({"reward": []}, "reward= is an empty list"),
    "reward's name": ({"reward": "gsm8"}, "did you mean 'gsm8k'"),
    "reward model": ({"reward": "org/model"}, r"overrides=\{'reward_model.model.path': 'org/model'\}"),
    "model object": ({"model": object()}, "model= must be a folder or a name on the Hub.* not a object; write"),
    "no model": ({"model": "/nowhere/model"}, "there is no such folder"),
    "no data": ({"data": []}, "data= is empty"),
    "stream": ({"data": datasets.Dataset.from_list(rows(2)).to_iterable_dataset()}, "data= is a stream, whose number"),
    "splits": (
        {"data": {"train": rows(1), "test": rows(1)}},
        r"keys train, test; give one split, such as …\['train'\]",
    ),
    "columns": ({"data": {"prompt": ["a", "b"]}}, r"is a dict with the keys prompt; give a table .*Dataset.from_dict"),
    "not a row": ({"data": [*rows(1), "text"]}, r"data\[1\] is a str, not a dict of columns"),
    "not JSON": ({"data": [{"prompt": object()}]}, r"data\[0\] cannot be written as JSON; .* a object is no value"),
    "no prompt": ({"data": [{"question": "1 + 1", "data_source": "a"}]}, "has no column 'prompt'"),
    "key": (
        {"overrides": {**KEYS, "actor.optim.lrr": 1}},
        r"optim.lrr: unknown key; did you mean actor.optim.lr",
    ),
    "overrides": ({"overrides": ["a=1"]}, "overrides= must be a dict such as"),
    "configuration": ({"config": SFTConfig.model_construct()}, "config= is a SFTConfig, but the recipe takes a GRPO"),
    "ready-made": ({"config": "grpo_gsm"}, "did you mean grpo_gsm8k"),
    "recipe": ({"recipe": "gpro"}, "unknown recipe 'gpro'; did you mean 'grpo'"),
    "no section": ({"recipe": "rm"}, "the recipe rm takes no reward=: its configuration has no section 'reward'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_leave_nothing(mistake: str, train: Any, tmp_path: Path) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(RlcoreError, match=message):
        train(**{"data": rows(4), "reward": length, **changes})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "grpo-1").mkdir()
    with pytest.raises(DataError, match=r"holds no run: there is no config.yaml in it; did you mean .*grpo-1"):
        rlcore.open_run(tmp_path / "grpo-2")


def test_functions_of_modules_are_imported_where_they_run() -> None:
    def path(reward: Any) -> str:
        found: str = reward_argument(reward).values(Path("inputs"))["reward"]["function"]["path"]
        return found

    assert path(json.dumps) == "json:dumps"
    assert path(length) == "inputs/reward.pickle:length"  # the test's module is not in sys.path
    assert path(json.JSONEncoder().encode) == "inputs/reward.pickle:encode"
    assert path(partial(print, "x")) == "inputs/reward.pickle:print"
    assert path(eval("lambda solution_str: 0.0", {})) == "inputs/reward.pickle:lambda"  # of no module
    assert path("my_file.py:Scorer.score") == "my_file.py:Scorer.score"


NOTEBOOK = (
    """
import os, signal, rlcore
weight, trainers = 0.5, []
async def scored(solution_str, **_):
    while trainers:
        os.kill(trainers.pop(), signal.SIGINT)
    return weight * len(solution_str)
def train(**given):
    return rlcore.train("grpo", model=MODEL, data=ROWS, overrides=KEYS, reward=scored, **given)
run = train()
run.complete, run.metrics.num_rows, run.metrics["critic/score/mean"][0].as_py()
""",
    """
trainers.append(os.getpid())
run = train(out_dir="a")
""",
    """
trainers.clear()
before = rlcore.open_run("a")
run = train(out_dir="a")
before.complete, before.metrics.num_rows, run.complete, run.metrics.num_rows
""",
)


def test_cells_of_a_notebook_train(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    keys = {**KEYS, "trainer.trackers": ["console"]}
    given = f"MODEL, ROWS, KEYS = {str(task.model)!r}, {rows(8)!r}, {keys!r}"
    cells = [nbformat.v4.new_code_cell(source) for source in (given, *NOTEBOOK)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    trained, interrupted, continued = (cell.outputs for cell in cells[1:])
    assert trained[-1].data["text/plain"] == "(True, 2, 4.0)"
    (shown,) = [output.data["text/html"] for output in trained if output.output_type == "display_data"]
    assert re.search("step 2/2.*<progress value='2' max='2'.*<pre.*score.*\\n +1/2 +4 .*\\n +2/2 ", shown, re.DOTALL)
    assert interrupted[-1].ename == "TrainingInterrupted"
    assert interrupted[-1].evalue == "interrupted after step 1; call rlcore.train again with out_dir='a'"
    assert continued[-1].data["text/plain"] == "(False, 1, True, 2)"


CONFIG = "trainer: {save_hf: false, checkpoint_dir: null}\n"
PLAN = '{"recipe": "grpo", "total_steps": 2}'
DAMAGED: Mapping[str, tuple[Mapping[str, str], str]] = {
    "configuration": ({"config.yaml": "seed: 1\n"}, "config.yaml cannot be read: KeyError: 'trainer'"),
    "plan": ({"plan.json": "[]"}, "plan.json is damaged"),
    "line of metrics": ({"metrics.jsonl": '{"step": 1}\n3\n'}, "metrics.jsonl, line 2 is damaged"),
    "metric": ({"metrics.jsonl": '{"step": 1, "loss": "low"}\n'}, "the metrics of the run are damaged"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_folder_is_named(damage: str, tmp_path: Path) -> None:
    files, message = DAMAGED[damage]
    for name, text in {"config.yaml": CONFIG, "plan.json": PLAN, **files}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RlcoreError, match=message):
        rlcore.open_run(tmp_path)


def test_run_under_way_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "plan.json").write_text(PLAN)
    assert rlcore.open_run(tmp_path).metrics.column_names == ["step"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "b": null}\n{"step": ')
    (tmp_path / "tables").mkdir()
    cells: list[Any] = [1, "two", None, 2**70]
    (tmp_path / "tables/rollouts.jsonl").write_text("".join(json.dumps({"step": 1, "x": x}) + "\n" for x in cells))
    run = rlcore.open_run(tmp_path)
    assert run.metrics.to_pylist() == [{"step": 1, "a": 1.0, "b": None}, {"step": 2, "a": None, "b": None}]
    assert run.rollouts["x"].to_pylist() == ["1", "two", None, str(2**70)]
    assert run.complete
