"""The estimate of a step's memory, compared with what autograd keeps and the optimizer allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.algorithms.objectives import SFTObjective, SFTObjectiveSettings
from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngineSpec
from rlcore_fsdp.engine import FSDPTrainEngine, build
from rlcore_fsdp.packed_model import training_mode
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.testing.tiny_model import tiny_model

TOKENS = 512


def engine_of(folder: Path, architecture: str, *, trained: bool = True, **options: Any) -> FSDPTrainEngine:
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6}
    path = tiny_model(folder / architecture, architecture=architecture, **shape)
    settings = FSDPSettings(device="cpu", **options)
    return build(TrainEngineSpec(ModelSettings(path=str(path)), settings, optim=OptimSettings() if trained else None))


def batch() -> Batch:
    lengths = torch.full((TOKENS // 64,), 64)
    tokens = torch.randint(5, 200, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return Batch({"tokens": Jagged(tokens, lengths), "loss_mask": Jagged(torch.ones(TOKENS), lengths)})


def kept_bytes(engine: FSDPTrainEngine) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in engine.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no later one gets its address
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        training_mode(engine._with_training_mode),
    ):
        engine._outputs(batch(), ForwardRequest(("logprobs",)))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Phi3"])
def test_activations_take_about_the_estimated_memory(tmp_path: Path, architecture: str, dtype: str) -> None:
    engine = engine_of(tmp_path, architecture, param_dtype=dtype, master_dtype=dtype)
    memory = engine.step_memory()
    estimate = TOKENS * memory.per_token * 6 / 7  # without the layer that represents the backward pass
    assert 0.95 < estimate / kept_bytes(engine) < 1.15


def test_the_fixed_part_of_the_estimate(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, "Qwen2", logits_chunk=100)
    parameters = sum(parameter.nbytes for parameter in engine.model.parameters())
    memory = engine.step_memory()
    assert memory.parameters * 4 == parameters
    assert memory.later == 2 * parameters
    assert memory.fixed == parameters + 16 * 100 * 261 + 8 * 261 * 64
    engine.train(batch(), SFTObjective(SFTObjectiveSettings()))
    moments = engine._optimizer.state.values()  # type: ignore[union-attr]
    assert sum(state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in moments) == memory.later
    assert engine.step_memory().later == 0  # they are among what is in use now


def test_frozen_models_and_scalar_heads_take_less(tmp_path: Path) -> None:
    trained = engine_of(tmp_path, "Llama").step_memory()
    recomputed = engine_of(tmp_path, "Llama", gradient_checkpointing=True).step_memory()
    frozen = engine_of(tmp_path, "Llama", trained=False).step_memory()
    assert frozen.per_token < recomputed.per_token < trained.per_token
    assert frozen.later == 0 < trained.later
    assert frozen.fixed < trained.fixed
