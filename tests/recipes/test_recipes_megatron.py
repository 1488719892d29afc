"""Recipes whose models are Megatron's, divided over processes, compute what they compute with FSDP's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

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
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grpo, tensor parallel": ("grpo", {"actor.objective.kl_loss.coeff": 0.01}, {"actor": TENSOR, "ref": TENSOR}),
    "ppo, pipeline parallel": ("ppo", {"critic.optim": ADAM}, {"actor": PIPELINE, "critic": PIPELINE}),
    "dapo, tensor parallel": ("dapo", {"algorithm.overlong": {"buffer": 4}}, {"actor": TENSOR}),
}


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    import ray

    import rlcore.controller.ray  # noqa: F401 (sets how Ray is used)
    from rlcore.controller.ray.cluster import _on_loopback

    with _on_loopback():
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS)
def test_megatron_computes_what_fsdp_does(
    task: Any, metrics_of: Any, ray_here: None, tmp_path: Path, case: str
) -> None:
    recipe, changes, engines = RUNS[case]
    alone, divided = tmp_path / "fsdp", tmp_path / "megatron"
    fsdp = {f"{role}.fsdp.device": "cpu" for role in engines}
    result = task.run(recipe, alone, {**RUN, **changes, **fsdp})
    assert result.exit_code == 0, result.output
    keys: dict[str, Any] = {
        "controller.kind": "ray",
        "controller.pools": {"train": {"processes": 2}, "gen": {"processes": 1}},
        "controller.placement": {**dict.fromkeys(engines, "train"), "rollout": "gen"},
        "controller.call_timeout_s": 600,
    }
    for role, options in engines.items():
        keys |= {f"{role}.engine": "megatron", f"{role}.megatron": options}
    result = task.run(recipe, divided, {**RUN, **changes, **keys})
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
    start = load_file(task.model / "model.safetensors")
    one, two = (load_file(folder / "model/model.safetensors") for folder in (alone, divided))
    assert one.keys() == two.keys()
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-4
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-6
