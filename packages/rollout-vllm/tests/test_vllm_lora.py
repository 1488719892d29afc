"""Updates of LoRA adapters in a running engine, in this process and in a separate one."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlcore.engines import (
    Completion,
    GenerationRequest,
    ModelSettings,
    RolloutEngine,
    RolloutSpec,
    SamplingParams,
    WeightBucket,
)
from rlcore.errors import EngineError
from rlcore_kit.testing.adapters import PREFIX, merged_model, random_adapters
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_vllm.engine import build
from rlcore_vllm.settings import VLLMSettings

RANK = 4
REQUESTS = [
    GenerationRequest([20 + index] * (index + 1), SamplingParams(max_tokens=12, seed=index, ignore_eos=True))
    for index in range(4)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # vLLM's attention on the CPU has no kernel for heads of less than 32 dimensions.
    path = tmp_path_factory.mktemp("model")
    return tiny_model(path, initializer_range=0.15, architecture="Llama", head_dim=32)


def make_engine(model: Path, rank: int | None = RANK, **options: Any) -> RolloutEngine:
    settings = VLLMSettings(kv_cache_memory_bytes=64 << 20, enable_lora=True, **options)
    return build(RolloutSpec(ModelSettings(path=str(model)), settings, max_model_len=64, adapter_rank=rank))


@pytest.fixture(scope="module", params=["in_process", "process"])
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[RolloutEngine]:
    engine = make_engine(model, mode=request.param)
    yield engine
    engine.close()


def plain(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")


def tiny_buckets(adapters: dict[str, torch.Tensor]) -> Iterator[WeightBucket]:
    """Buckets of one tensor each, in memory that is overwritten afterwards."""
    for name, tensor in adapters.items():
        sent = tensor.clone()
        yield WeightBucket(((name, sent),))
        sent.fill_(float("nan"))


@torch.no_grad()
def logprobs(reference: Any, asked: GenerationRequest, made: Completion) -> torch.Tensor:
    """Log-probs of ``reference`` for the completion's tokens."""
    logits = reference(input_ids=torch.tensor([[*asked.prompt, *made.tokens]])).logits[0, len(asked.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(made.tokens)[:, None])[:, 0]


def largest_difference(reference: Any, engine: RolloutEngine, version: int) -> float:
    """Largest difference of log-probs of new completions, all of ``version``, to those of ``reference``."""
    found = []
    for asked, made in zip(REQUESTS, engine.generate_batch(REQUESTS), strict=True):
        assert made.versions == [(version, len(made.tokens))]
        found.append(float((logprobs(reference, asked, made) - torch.tensor(made.logprobs)).abs().max()))
    return max(found)


def test_adapters_are_replaced_in_place(engine: RolloutEngine, model: Path) -> None:
    """Prompts stay the same, so that a prefix cache of an older version would be noticed."""
    assert engine.takes_adapters
    assert largest_difference(plain(model), engine, engine.version) < 1e-4
    for version in range(1, 4):
        adapters = random_adapters(model, RANK, seed=version)
        reference = merged_model(model, adapters)
        assert largest_difference(reference, engine, version - 1) > 1e-2, "a skipped update would not be seen"
        engine.update_weights(tiny_buckets(adapters), version)
        assert engine.version == version
        assert largest_difference(reference, engine, version) < 1e-4


def test_tensor_parallel_workers_take_adapters(model: Path) -> None:
    """Each worker takes full adapters and computes with its shard."""
    engine = make_engine(model, mode="process", tensor_parallel_size=2)
    try:
        for version in (1, 2):
            adapters = random_adapters(model, RANK, seed=version)
            engine.update_weights(tiny_buckets(adapters), version)
            assert largest_difference(merged_model(model, adapters), engine, version) < 1e-4
    finally:
        engine.close()


def test_layers_without_adapters_compute_as_before(engine: RolloutEngine, model: Path) -> None:
    """An update replaces all adapters: others are removed. A part of a fused layer may have one."""
    adapters = random_adapters(model, RANK, seed=9)
    few = {name: tensor for name, tensor in adapters.items() if "v_proj" in name or "layers.1.mlp.up_proj" in name}
    engine.update_weights(tiny_buckets(few), 10)
    assert largest_difference(merged_model(model, few), engine, 10) < 1e-4


def test_unfinished_requests_continue_with_new_adapters(engine: RolloutEngine, model: Path) -> None:
    """Every token has the version of the adapters that sampled it."""
    adapters = {version: random_adapters(model, RANK, seed=version) for version in (20, 21)}
    engine.update_weights(tiny_buckets(adapters[20]), 20)
    asked = GenerationRequest([7, 8, 9], SamplingParams(max_tokens=40, seed=3, ignore_eos=True))

    async def generate() -> Any:
        making = asyncio.ensure_future(engine.generate(asked))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.update_weights, tiny_buckets(adapters[21]), 21)
        return await making

    made = asyncio.run(generate())
    references = {version: logprobs(merged_model(model, adapters[version]), asked, made) for version in adapters}
    versions = [version for version, count in made.versions for _ in range(count)]
    assert len(versions) == 40
    for place, (version, found) in enumerate(zip(versions, made.logprobs, strict=True)):
        assert found == pytest.approx(float(references[version][place]), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(next(iter(a))), "lacks a matrix of base_model.model.model.layers.0.self_attn.q_proj"),
        (lambda a: a.clear() or a.update({"model.norm.weight": torch.ones(32)}), "accepts adapters, not model.norm"),
        (
            lambda a: a.update({f"{PREFIX}wait.lora_{part}.weight": torch.ones(1, 1) for part in "AB"}),
            "no layers for 1 of the adapters: wait",
        ),
        (
            lambda a: a.update(
                {name: torch.ones(9, 32) if "_A" in name else torch.ones(64, 9) for name in list(a)[:2]}
            ),
            "rank 9 is greater than max_lora_rank 8",
        ),
    ],
    ids=["half an adapter", "full weights", "an unknown layer", "too high a rank"],
)
def test_adapters_of_another_model_are_refused(engine: RolloutEngine, model: Path, change: Any, message: str) -> None:
    adapters = random_adapters(model, RANK, seed=1)
    change(adapters)
    with pytest.raises(EngineError, match=message):
        engine.update_weights(tiny_buckets(adapters), 30)
    with pytest.raises(EngineError, match="weight update 30 failed midway"):
        engine.generate_batch(REQUESTS[:1])
    right = random_adapters(model, RANK, seed=4)
    engine.update_weights(tiny_buckets(right), 31)
    assert largest_difference(merged_model(model, right), engine, 31) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "process", "weight_transfer": "nccl"}, "set weight_transfer to rlcore, not nccl"),
        ({"sleep_level": 2}, "sleep_level=2 drops the base weights"),
        ({"load_format": "dummy"}, "load_format=dummy reads no base weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradicting_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMSettings(enable_lora=True, **options)


def test_a_rank_that_vllm_does_not_support_is_refused(model: Path) -> None:
    with pytest.raises(EngineError, match="enable_lora: the policy trains full weights"):
        make_engine(model, rank=None)
    with pytest.raises(EngineError, match="vLLM takes at most 512"):
        make_engine(model, rank=513)
