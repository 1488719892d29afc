"""Recipes that generate with vLLM on the CPU: in the trainer's process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlcore_kit.testing.tiny_model import tiny_model

Metrics = Callable[[Path], list[dict[str, float]]]
VLLM = {
    "rollout.engine": "vllm",
    "rollout.vllm": {"kv_cache_memory_bytes": 16 << 20, "max_num_seqs": 64},
    "actor.fsdp.device": "cpu",
    "actor.optim.lr": 5e-3,
    "trainer.val_before_train": False,
}


@pytest.fixture(scope="module")
def vllm_task(task: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Changes under which the task runs with vLLM, whose attention has no kernel on the CPU for heads under 32."""
    path = tiny_model(tmp_path_factory.mktemp("vllm") / "model", architecture="Llama", head_dim=32)
    return {**VLLM, "model.path": path}


def generated_with_the_trainers_weights(step: dict[str, float]) -> bool:
    return abs(step["actor/rollout_ratio_max"] - 1) < 1e-3 and abs(step["actor/rollout_log_ratio_p999"]) < 1e-3


@pytest.mark.slow
def test_grpo_learns_in_the_trainers_process(
    task: Any, vllm_task: dict[str, Any], metrics_of: Metrics, tmp_path: Path
) -> None:
    changes = {"trainer.total_steps": 25, "data.train_batch_size": 16, "actor.optim.lr": 1e-2}
    result = task.run("grpo", tmp_path, {**vllm_task, **changes})
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path)
    assert len(steps) == 25
    assert all(map(generated_with_the_trainers_weights, steps))
    scores = [step["critic/score/mean"] for step in steps]
    assert scores[0] < 0.2
    assert sum(scores[-3:]) / 3 > 0.8, scores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes"), [("ppo", {"critic.fsdp.device": "cpu"}), ("dapo", {"algorithm.overlong": {"buffer": 4}})]
)
def test_other_recipes_in_the_trainers_process(
    task: Any, vllm_task: dict[str, Any], metrics_of: Metrics, tmp_path: Path, recipe: str, changes: dict[str, Any]
) -> None:
    result = task.run(recipe, tmp_path, {**vllm_task, **changes})
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path)
    assert len(steps) == 3
    assert all(map(generated_with_the_trainers_weights, steps))


@pytest.mark.slow
def test_a_skipped_sync_shows_as_mismatch(
    task: Any, vllm_task: dict[str, Any], metrics_of: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlcore_vllm.engine import VLLMRollout

    update = VLLMRollout.update_weights

    def skip_second(self: Any, buckets: Any, version: int) -> None:
        if version == 1:
            self._version = version
        else:
            update(self, buckets, version)

    monkeypatch.setattr(VLLMRollout, "update_weights", skip_second)
    result = task.run("grpo", tmp_path, {**vllm_task, "trainer.total_steps": 3})
    assert result.exit_code == 0, result.output
    assert [generated_with_the_trainers_weights(step) for step in metrics_of(tmp_path)] == [True, False, True]
