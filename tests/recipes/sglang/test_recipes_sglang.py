"""Recipes that generate with SGLang on the CPU: on a managed server, and on one that runs already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlcore_kit.testing.forks import ForkServer

Metrics = Callable[[Path], list[dict[str, float]]]
STEPS = 3
KEY_VARIABLE = "RLCORE_TEST_SGLANG_KEY"
SHIM = Path(__file__).parents[3] / "packages/rollout-sglang/tests/cpu_shim"
STARTED = {
    "device": "cpu",
    "mem_fraction_static": 0.8,  # of the memory that other processes leave; max_total_tokens bounds the cache
    "max_total_tokens": 16384,
    "max_running_requests": 64,
    "env": {"PYTHONPATH": str(SHIM), "OMP_NUM_THREADS": "1"},
    "args": {"grammar_backend": "none"},
}
SGLANG = {
    "rollout.engine": "sglang",
    "actor.fsdp.device": "cpu",
    "actor.optim.lr": 5e-3,
    "trainer.val_before_train": False,
    "trainer.total_steps": STEPS,
}
PARTS_OF_CORES = {"cpus_per_process": 0.5}
APART = {
    "controller.kind": "ray",
    "controller.pools": {"train": PARTS_OF_CORES, "gen": PARTS_OF_CORES},
    "controller.placement": {"actor": "train", "rollout": "gen", "reward": "train", "compute": "train"},
    "controller.call_timeout_s": 300,
    "async.max_staleness": 1,
    "actor.objective.correction": "tis",
    "trainer.total_steps": 2 * STEPS,
    # sequences that take as long as a step: on most machines some see new weights
    "data.max_response_length": 96,
    "data.train_batch_size": 4,
}
RECIPES: dict[str, dict[str, Any]] = {"grpo": {}, "dapo": {"algorithm.overlong": {"buffer": 4}}}


@pytest.fixture(scope="module")
def running(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Options of the engine over a server that runs already."""
    from rlcore.engines import ModelSettings, RolloutSpec
    from rlcore_sglang.engine import build
    from rlcore_sglang.settings import SGLangSettings

    settings = SGLangSettings(**STARTED, log_dir=tmp_path_factory.mktemp("logs"))
    engine: Any = build(RolloutSpec(ModelSettings(path=str(task.model)), settings, max_model_len=256))
    server = engine.engines["SGLang server 0"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(KEY_VARIABLE, server.process.api_key)
        yield {"urls": [server.url], "api_key_env": KEY_VARIABLE, "keep_weights": False}
    engine.close()


@pytest.fixture(scope="module")
def cluster(running: dict[str, Any], forks: ForkServer) -> Iterator[None]:
    """One cluster for all runs of this module; its workers see the key."""
    from rlcore.controller.placement import ResourcePool
    from rlcore_ray import cluster

    with forks.ray_workers():
        started = cluster.connect(None, {"all": ResourcePool(processes=4)})
    yield
    if started:
        cluster.disconnect()


@pytest.mark.slow
def test_grpo_learns_on_a_server_that_it_starts(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    changes = {
        "rollout.sglang": {**STARTED, "log_dir": str(tmp_path / "logs")},
        "trainer.total_steps": 25,
        "data.train_batch_size": 16,
        "actor.optim.lr": 1e-2,
    }
    result = task.run("grpo", tmp_path, {**SGLANG, **changes})
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path)
    assert len(steps) == 25
    assert all(map(sampled_by_the_trained_policy, steps))
    scores = [step["critic/score/mean"] for step in steps]
    assert scores[0] < 0.2
    assert sum(scores[-3:]) / 3 > 0.8, scores


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "trainer"), [("grpo", "megatron"), ("dapo", "fsdp")])
def test_step_by_step(
    task: Any, running: dict[str, Any], metrics_of: Metrics, tmp_path: Path, recipe: str, trainer: str
) -> None:
    engine = {"actor.engine": trainer, f"actor.{trainer}.device": "cpu", "actor.fsdp.device": "cpu"}
    result = task.run(recipe, tmp_path, {**SGLANG, "rollout.sglang": running, **RECIPES[recipe], **engine})
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path)
    assert len(steps) == STEPS
    assert all(map(sampled_by_the_trained_policy, steps))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_step_off(task: Any, running: dict[str, Any], metrics_of: Metrics, tmp_path: Path, recipe: str) -> None:
    """Samples are a version old, and may cross an update; the server's log-probs are those of the versions it names."""
    changes = {**SGLANG, "rollout.sglang": running, **APART, **RECIPES[recipe]}
    result = task.run(recipe, tmp_path, changes)
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path)
    assert len(steps) == 2 * STEPS
    assert all(0 <= step["rollout/staleness_mean"] <= step["rollout/staleness_max"] <= 1 for step in steps)
    assert max(step["rollout/staleness_max"] for step in steps) == 1
    assert 0 < max(step["actor/rollout_kl_k3"] for step in steps) < 0.05, "an update older, and no older"


def sampled_by_the_trained_policy(step: dict[str, float]) -> bool:
    """Whether the sampler's log-probs of its tokens are the trainer's within 1e-3, before the step's update."""
    return abs(step["actor/rollout_ratio_max"] - 1) < 1e-3 and abs(step["actor/rollout_log_ratio_p999"]) < 1e-3
