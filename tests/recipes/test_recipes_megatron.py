"""Recipes whose models are Megatron's, divided over processes, compute what they compute with FSDP's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from rlcore.engines import ModelSettings, TrainEngineSpec
from rlcore_fsdp.engine import build as build_fsdp
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_megatron.families import family_of
from rlcore_recipes.checkpoint import verify

Metrics = Callable[[Path], list[dict[str, float]]]
# Far from the sign-like steps that Adam makes at the start, which would blow differences in the last bit up.
ADAM = {"lr": 1e-3, "eps": 1e-4}
RUN = {
    "trainer.total_steps": 2,
    "trainer.test_freq": 2,
    "trainer.val_before_train": False,
    "trainer.save_hf": True,
    "actor.optim": ADAM,
    "actor.mini_batch_size": 4,
}
TENSOR = {"device": "cpu", "tensor_parallel": 2, "sequence_parallel": True}
PIPELINE = {"device": "cpu", "pipeline_parallel": 2}
LORA = {"rank": 4, "alpha": 8}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grpo, tensor parallel": ("grpo", {"actor.objective.kl_loss.coeff": 0.01}, {"actor": TENSOR, "ref": TENSOR}),
    "grpo, adapters": (
        "grpo",
        {"actor.objective.kl_loss.coeff": 0.01, "actor.fsdp.lora": LORA},
        {"actor": {**TENSOR, "lora": LORA}},
    ),
    "ppo, pipeline parallel": ("ppo", {"critic.optim": ADAM}, {"actor": PIPELINE, "critic": PIPELINE}),
    "dapo, tensor parallel": ("dapo", {"algorithm.overlong": {"buffer": 4}}, {"actor": TENSOR}),
    "grpo, expert parallel": ("grpo", {}, {"actor": {"device": "cpu", "expert_parallel": 2}}),
}
EXPERTS: dict[str, Any] = {
    "architecture": "Qwen3Moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def on_ray(engines: Mapping[str, Any], processes: int = 2) -> dict[str, Any]:
    """Keys that give each role its Megatron options, in a pool apart from the rollout's."""
    keys: dict[str, Any] = {
        "controller.kind": "ray",
        "controller.pools": {
            "train": {"processes": processes, "cpus_per_process": 0.5},
            "gen": {"cpus_per_process": 0.5},
        },
        "controller.placement": {**dict.fromkeys(engines, "train"), "rollout": "gen"},
        "controller.call_timeout_s": 600,
    }
    for role, options in engines.items():
        keys |= {f"{role}.engine": "megatron", f"{role}.megatron": options}
    return keys


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("case", RUNS)
def test_megatron_computes_what_fsdp_does(task: Any, metrics_of: Metrics, tmp_path: Path, case: str) -> None:
    recipe, changes, engines = RUNS[case]
    model = tiny_model(tmp_path / "model", **EXPERTS) if "expert" in case else task.model
    changes = {**RUN, **changes, "model.path": model}
    alone, divided = tmp_path / "fsdp", tmp_path / "megatron"
    result = task.run(recipe, alone, {**changes, **{f"{role}.fsdp.device": "cpu" for role in engines}})
    assert result.exit_code == 0, result.output
    result = task.run(recipe, divided, {**changes, **on_ray(engines)})
    assert result.exit_code == 0, result.output

    compared = set()
    for before, after in zip(metrics_of(alone), metrics_of(divided), strict=True):
        assert before["step"] == after["step"]
        for name in before:
            if name.startswith(("actor/", "critic/", "val", "response_length/", "reward")):
                # fp32 sums in another order, carried through the optimizer steps
                assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-6), (before["step"], name)
                compared.add(name)
    assert {"actor/grad_norm", "actor/entropy"} <= compared
    assert ("critic/grad_norm" in compared) == ("critic" in engines)
    start = load_file(model / "model.safetensors")
    one, two = (load_file(folder / "model/model.safetensors") for folder in (alone, divided))
    assert one.keys() == two.keys()
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-4
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-6


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_resumed_run_ends_with_the_same_weights(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    """The actor's checkpoints are in Megatron's own format, the critic's in ours."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    engines = {"actor": {**PIPELINE, "checkpoint_format": "torch_dist"}, "critic": PIPELINE}
    changes = {**RUN, "critic.optim": ADAM, "trainer.save_freq": 1, **on_ray(engines)}
    result = task.run("ppo", whole, changes)
    assert result.exit_code == 0, result.output
    saved = whole / "checkpoints" / "step-000001"
    verify(saved)
    manifest = json.loads((saved / "manifest.json").read_text())["files"]
    assert {f"actor/{file.name}" for file in (saved / "actor").iterdir()} <= manifest.keys()
    assert {"actor/.metadata", "actor/__1_0.distcp", "critic/rank-00001.safetensors"} <= manifest.keys()
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "model")
    shutil.rmtree(resumed / "checkpoints" / "step-000002")
    result = task.run("ppo", resumed, changes)
    assert result.exit_code == 0, result.output
    assert "continuing after step 1" in result.output
    assert [line["step"] for line in metrics_of(resumed)] == [1, 2]
    expected, found = (load_file(folder / "model/model.safetensors") for folder in (whole, resumed))
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
    assert metrics_of(whole)[-1]["critic/grad_norm"] == metrics_of(resumed)[-1]["critic/grad_norm"]


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3Moe", "Mixtral"])
def test_both_engines_export_the_same_names_in_the_same_order(tmp_path: Path, architecture: str) -> None:
    experts = {"Qwen3Moe": {"num_experts": 12, "moe_intermediate_size": 16}, "Mixtral": {"num_local_experts": 12}}
    path = tiny_model(tmp_path, architecture=architecture, **experts.get(architecture, {}))
    engine = build_fsdp(TrainEngineSpec(ModelSettings(path=str(path)), FSDPSettings(device="cpu")))
    names = [name for bucket in engine.export_weights() for name, _ in bucket.tensors]
    engine.close()
    config = AutoConfig.from_pretrained(path)
    # `rlcore_megatron.weights` streams these in this order, as its own tests show
    assert names == [named.name for named in family_of(config).body(config)]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_weights_reach_vllm_from_a_divided_pipeline(task: Any, metrics_of: Metrics, tmp_path: Path) -> None:
    """Tensor and pipeline shards of four processes become the layers of an engine that is not divided."""
    # vLLM's attention has no kernel on the CPU for heads of fewer than 32 dimensions
    model = tiny_model(tmp_path / "model", architecture="Llama", head_dim=32)
    changes = {
        **on_ray({"actor": {**TENSOR, "pipeline_parallel": 2}}, processes=4),
        "model.path": model,
        "rollout.engine": "vllm",
        "rollout.vllm": {"kv_cache_memory_bytes": 16 << 20, "max_num_seqs": 64},
        "actor.optim.lr": 5e-3,
        "trainer.val_before_train": False,
        "trainer.total_steps": 3,
    }
    result = task.run("grpo", tmp_path / "run", changes)
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path / "run")
    assert len(steps) == 3
    for step in steps:
        quantiles = (step["actor/rollout_log_ratio_p001"], step["actor/rollout_log_ratio_p999"])
        assert abs(step["actor/rollout_ratio_max"] - 1) < 1e-4
        assert all(abs(value) < 1e-4 for value in quantiles)
