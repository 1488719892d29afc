"""The estimate of a step's memory: the share of a process under each kind of parallelism."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config

from rlcore.engines.step_memory import StepMemory
from rlcore_megatron.settings import MegatronSettings
from rlcore_megatron.step_memory import step_memory

CONFIG = Qwen2Config(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def memory(trained: int = 10_000, stepped: bool = False, data_parallel: int = 1, **settings: Any) -> StepMemory:
    return step_memory(
        CONFIG,
        MegatronSettings(logits_chunk=10, **settings),
        torch.device("cpu"),
        2,
        parameters=10_000,
        data_parallel=data_parallel,
        trained=trained,
        stepped=stepped,
    )


def test_each_kind_of_parallelism_saves_its_part() -> None:
    undivided = memory()
    layer = 2 * (4 * 64 + 4 * 64 + 3 * 32 + 4 * 256) + 4 * (2 * 64 + 64 + 32)
    assert undivided.per_token == 9 * layer
    assert (undivided.later, undivided.parameters) == (8 * 10_000, 10_000)
    assert undivided.fixed == 16 * 10 * 1000 + 8 * 1000 * 64
    tensor = memory(tensor_parallel=2)
    assert tensor.per_token == 9 * (2 * (4 * 64 + (4 * 64 + 3 * 32 + 4 * 256) // 2) + 4 * (2 * 64 + 48))
    assert tensor.fixed == undivided.fixed // 2
    assert memory(context_parallel=2).per_token == -(-undivided.per_token // 2)
    assert memory(pipeline_parallel=2).per_token == undivided.per_token
    assert memory(pipeline_parallel=2, virtual_pipeline=2).per_token == undivided.per_token * 5 // 4
    assert memory(recompute="full").per_token == 2 * layer + 8 * 2 * 64
    assert memory(trained=0).per_token == layer


def test_optimizer_states_are_counted_until_they_exist() -> None:
    assert memory(data_parallel=4).later == 20_000
    assert memory(data_parallel=4, distributed_optimizer=False).later == 80_000
    assert memory(stepped=True).later == memory(trained=0).later == memory(offload_optimizer=True).later == 0
    assert memory(tensor_parallel=2).parameters is None
