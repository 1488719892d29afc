"""Adapters from end to end: trained by the FSDP engine, generated with by inline and by vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlcore.batch import Batch, Jagged
from rlcore.engines import (
    ForwardRequest,
    GenerationRequest,
    LoRASettings,
    ModelSettings,
    OptimSettings,
    RolloutSpec,
    SamplingParams,
    TrainEngineSpec,
    sync_weights,
)
from rlcore_fsdp import engine as engine_module
from rlcore_fsdp.model_building import build_model
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import WeightedLogprobs, make_batch

Metrics = Callable[[Path], list[dict[str, float]]]
LORA = {"actor.fsdp": {"device": "cpu", "lora": {"rank": 8, "alpha": 16}}, "trainer.val_before_train": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen head with which a policy can prefer tokens; vLLM's attention on the CPU needs heads of 32 dimensions."""
    path = tmp_path_factory.mktemp("lora") / "model"
    return tiny_model(path, architecture="Llama", head_dim=32, initializer_range=0.15)


def test_grpo_changes_adapters_only(task: Any, model: Path, metrics_of: Metrics, tmp_path: Path) -> None:
    changes = {
        "model.path": model,
        "actor.optim.lr": 2e-2,
        "trainer.total_steps": 12,
        "trainer.save_hf": True,
        "data.train_batch_size": 16,
        "rollout.n": 8,
    }
    result = task.run("grpo", tmp_path, {**LORA, **changes})
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path)
    assert all(abs(step["actor/rollout_ratio_max"] - 1) < 1e-3 for step in steps)
    scores = [step["critic/score/mean"] for step in steps]
    assert sum(scores[-3:]) / 3 > scores[0] + 0.2, scores
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "model"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) is not name.endswith("_proj.weight"), name
    adapters = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    down, up = (adapters[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    merged = before[f"{name}.weight"] + 2 * up @ down
    torch.testing.assert_close(after[f"{name}.weight"], merged, atol=1e-6, rtol=0)


def run_with_reference(
    task: Any, recipe: str, out_dir: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> int:
    """Run ``recipe`` with adapters and a KL penalty; return how many models were built."""
    built: list[str] = []

    def counted(spec: TrainEngineSpec, *args: Any, **kwargs: Any) -> Any:
        built.append(spec.head)
        return build_model(spec, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "build_model", counted)
        kl = {"actor.objective.kl_loss.coeff": 0.1, "actor.optim.lr": 1e-2, "algorithm.kl_in_reward": {"coeff": 0.1}}
        result = task.run(recipe, out_dir, {**LORA, **kl, **changes})
    assert result.exit_code == 0, result.output
    assert ("the actor without its adapters" in result.output) is ("ref.model.path" not in changes)
    return built.count("policy")


def without_times(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    measured = ("time", "perf/", "timing", "system/")
    return [{name: value for name, value in step.items() if not name.startswith(measured)} for step in steps]


@pytest.mark.parametrize("recipe", ["grpo", "ppo", "dapo"])
def test_the_actor_is_its_reference(
    task: Any, model: Path, metrics_of: Metrics, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a second model, all metrics are those of a run with one, to the last bit."""
    changes: dict[str, Any] = {"model.path": model, "trainer.total_steps": 3, "trainer.test_freq": -1}
    if recipe == "ppo":
        changes["critic.fsdp"] = {"device": "cpu", "lora": {"rank": 2}}
    if recipe == "dapo":
        changes["algorithm.overlong"] = "null"
    one = run_with_reference(task, recipe, tmp_path / "one", changes, monkeypatch)
    two = run_with_reference(task, recipe, tmp_path / "two", {**changes, "ref.model.path": model}, monkeypatch)
    assert (one, two) == (1, 2)
    ours, expected = (without_times(metrics_of(tmp_path / name)) for name in ("one", "two"))
    assert ours == expected
    assert ours[-1]["actor/kl_loss"] > 0


def test_vllm_generates_with_adapters_of_every_step(model: Path) -> None:
    """Fresh tokens have the trainer's log-probs after every optimizer step; what travels is a part of the weights."""
    from rlcore_fsdp.engine import build as build_trainer
    from rlcore_fsdp.settings import FSDPSettings
    from rlcore_vllm.engine import build
    from rlcore_vllm.settings import VLLMSettings

    named = ModelSettings(path=str(model))
    options = FSDPSettings(device="cpu", lora=LoRASettings(rank=2, alpha=8))
    trainer = build_trainer(TrainEngineSpec(named, options, optim=OptimSettings(lr=2e-2)))
    settings = VLLMSettings(enable_lora=True, kv_cache_memory_bytes=16 << 20)
    rollout = build(RolloutSpec(named, settings, max_model_len=64, adapter_rank=2))
    requests = [
        GenerationRequest([20 + index] * (index + 1), SamplingParams(max_tokens=12, seed=index, ignore_eos=True))
        for index in range(4)
    ]

    def differences(version: int) -> torch.Tensor:
        """Of the log-probs of fresh tokens, all by ``version``."""
        found = []
        for asked, made in zip(requests, rollout.generate_batch(requests), strict=True):
            assert made.versions == [(version, 12)]
            tokens = Batch({"tokens": Jagged.from_list([[*asked.prompt, *made.tokens]])})
            expected = trainer.forward(tokens, ForwardRequest()).flat("logprobs")[len(asked.prompt) :]
            found.append((expected - torch.tensor(made.logprobs)).abs())
        return torch.cat(found)

    try:
        assert differences(0).max() < 1e-4
        for version in range(1, 6):
            trainer.train(make_batch(seed=version), WeightedLogprobs())
            assert differences(version - 1).max() > 1e-3, "a skipped sync would not be seen"
            sync_weights(trainer, rollout, version)
            assert rollout.version == version
            assert differences(version).max() < 1e-4
    finally:
        rollout.close()
    adapters, whole = (
        sum(bucket.nbytes for bucket in export()) for export in (trainer.export_adapters, trainer.export_weights)
    )
    assert adapters < whole / 5


@pytest.mark.slow
def test_grpo_with_vllm_and_adapters(task: Any, model: Path, metrics_of: Metrics, tmp_path: Path) -> None:
    rollout = {"rollout.engine": "vllm", "rollout.vllm": {"kv_cache_memory_bytes": 16 << 20, "enable_lora": True}}
    changes = {**LORA, **rollout, "model.path": model, "actor.optim.lr": 1e-2}
    result = task.run("grpo", tmp_path, changes)
    assert result.exit_code == 0, result.output
    for step in metrics_of(tmp_path):
        assert abs(step["actor/rollout_ratio_max"] - 1) < 1e-3


def test_a_policy_without_adapters_is_refused(task: Any, tmp_path: Path) -> None:
    result = task.run("grpo", tmp_path, {"rollout.engine": "vllm", "rollout.vllm": {"enable_lora": True}})
    assert result.exit_code != 0
    assert "rollout.vllm.enable_lora: the actor's engine fsdp trains full weights here" in result.output
