"""A task that a tiny model learns in seconds, and ways to run recipes on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rlcore import plugins
from rlcore.cli.command_tree import cli
from rlcore_kit.serving.ports import unused_port
from rlcore_kit.testing.forks import Forked, ForkServer
from rlcore_kit.testing.tiny_model import tiny_model

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    '''The share of lower-case letters among eight characters.'''
    return sum(c.isascii() and c.islower() for c in solution_str) / 8
"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# What trainers, rollouts and recipes import that takes seconds. Not Ray: see `ForkServer`.
SLOW_TO_IMPORT = (
    "rlcore_fsdp.engine",
    "rlcore_inline.engine",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)
CLUSTER = {"num_cpus": 6, "num_gpus": 1}
"""For the scheduler only: processes may outnumber cores, and halves of the GPU are two processes."""


Changes = Mapping[str, Any]
NO_CHANGES: Changes = {}


class Task:
    """Files of the task, and recipes run on it.

    Attributes:
        keys: overrides that every recipe but sft needs.
    """

    def __init__(self, folder: Path, forks: ForkServer) -> None:
        self.folder, self.forks = folder, forks
        self.model = tiny_model(folder / "model")
        self.train = self.write("train.jsonl", 48)
        self.val = self.write("test.jsonl", 6)
        self.reward = folder / "reward.py"
        self.reward.write_text(REWARD)
        self.keys = {
            "model.path": self.model,
            "data.train_files": self.train,
            "data.val_files": self.val,
            "data.train_batch_size": 8,
            "data.max_prompt_length": 32,
            "data.max_response_length": 8,
            "rollout.n": 4,
            "reward.path": f"{self.reward}:compute_score",
            "reward.workers": 1,
            "trainer.trackers": "[jsonl]",
            "trainer.total_steps": 3,
        }

    def write(self, name: str, rows: int, **columns: Any) -> Path:
        path = self.folder / name
        row = {"ground_truth": "x", "data_source": "letters", "response": "abcd", **columns}
        prompts = [[{"role": "user", "content": f"say {number}"}] for number in range(rows)]
        path.write_text("".join(json.dumps({"prompt": prompt, **row}) + "\n" for prompt in prompts))
        return path

    def arguments(self, recipe: str, out_dir: Path, changes: Changes) -> list[str]:
        """Command line of a run: ``keys`` under ``changes``, of which None leaves a key out."""
        keys = {**self.keys, "trainer.out_dir": out_dir, **changes}
        return ["run", recipe, *(f"{key}={value}" for key, value in keys.items() if value is not None)]

    def run(self, recipe: str, out_dir: Path, changes: Changes = NO_CHANGES) -> Result:
        """In this process."""
        return CliRunner().invoke(cli, self.arguments(recipe, out_dir, changes), catch_exceptions=False)

    def start(
        self,
        recipe: str,
        out_dir: Path,
        changes: Changes = NO_CHANGES,
        processes: int = 1,
        new_session: bool = False,
    ) -> subprocess.Popen[str]:
        """Start the recipe as a program, by torchrun where it has several processes."""
        launcher = [sys.executable, "-m"]
        if processes > 1:
            launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        arguments = self.arguments(recipe, out_dir, changes)[2:]
        return subprocess.Popen(
            [*launcher, f"rlcore_recipes.{recipe}", *arguments],
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=new_session,
        )

    def fork(self, recipe: str, out_dir: Path, changes: Changes = NO_CHANGES, processes: int = 1) -> list[Forked]:
        """Start the recipe's program as `start` does, in forked processes; return that of each rank."""
        program = ["-m", f"rlcore_recipes.{recipe}", *self.arguments(recipe, out_dir, changes)[2:]]
        environment = {**os.environ, **ENVIRONMENT}
        if processes == 1:
            return [self.forks.start(program, environment)]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port()), "WORLD_SIZE": str(processes)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        return [self.forks.start(program, environment | rank) for rank in ranks]


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell ignores SIGINT for what it starts in the background, and so would the runs that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def forks(scripted: None) -> Iterator[ForkServer]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server = ForkServer(*SLOW_TO_IMPORT)
    yield server
    server.close()


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The environment ``scripted``, a package that every process of a session finds."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).parent / "scripted_environment.py", site)
    (site / "scripted-1.dist-info").mkdir()
    (site / "scripted-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: scripted\nVersion: 1\n")
    entry_points = "[rlcore.environments]\nscripted = scripted_environment:scripted\n"
    (site / "scripted-1.dist-info/entry_points.txt").write_text(entry_points)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        plugins._points.cache_clear()
        yield
    plugins._points.cache_clear()


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Task:
    return Task(tmp_path_factory.mktemp("task"), forks)


@pytest.fixture(scope="session")
def teacher(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained to answer ``abcd``."""
    out: Path = tmp_path_factory.mktemp("teacher")
    sft = {name: task.keys[name] for name in ("model.path", "data.train_files", "trainer.trackers")}
    keys = {**dict.fromkeys(task.keys), **sft, "data.train_batch_size": 16, "data.max_length": 64}
    keys |= {"trainer.total_steps": 20, "trainer.save_hf": True, "actor.optim.lr": 1e-2}
    result = task.run("sft", out, keys)
    assert result.exit_code == 0, result.output
    return out / "model"


@pytest.fixture(scope="session")
def clusters(forks: ForkServer) -> Iterator[None]:
    """End the cluster that `cluster` started."""
    yield
    from rlcore_ray import cluster

    cluster.disconnect()


@pytest.fixture
def cluster(clusters: None, forks: ForkServer) -> None:
    """One Ray cluster for all runs of a session; its workers are forked."""
    import ray

    from rlcore_ray import cluster

    if not ray.is_initialized():
        with forks.ray_workers():
            cluster._start({**CLUSTER, "log_to_driver": False, "logging_level": "error"})


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], list[dict[str, float]]]:
    """Lines of a run's ``metrics.jsonl``."""

    def read(out_dir: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]

    return read
