"""Engines that cannot start, die, or hang: one clear message, and another engine with the next weights."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlcore.engines import Completion, GenerationRequest, ModelSettings, RolloutSpec, SamplingParams, WeightBucket
from rlcore.errors import EngineError, WorkerDied
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_vllm.engine import VLLMRollout, build
from rlcore_vllm.settings import VLLMSettings

KV_CACHE_BYTES = 32 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(
        tmp_path_factory.mktemp("model"), architecture="Llama", head_dim=32, max_position_embeddings=20_000
    )


@pytest.fixture(scope="module")
def weights(model: Path) -> list[WeightBucket]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [WeightBucket(tuple((name, parameter.detach()) for name, parameter in loaded.named_parameters()))]


def start(model: Path, max_model_len: int = 20_000, **options: Any) -> VLLMRollout:
    settings = VLLMSettings(**{"kv_cache_memory_bytes": KV_CACHE_BYTES, **options})
    engine = build(RolloutSpec(ModelSettings(path=str(model)), settings, max_model_len))
    assert isinstance(engine, VLLMRollout)
    return engine


def request(max_tokens: int) -> GenerationRequest:
    return GenerationRequest([10, 20, 30], SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True))


# --- engines that cannot start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "max_model_len", "message"),
    [
        ({"args": {"quantisation": "fp8"}}, 64, r"no argument quantisation; did you mean quantization"),
        (
            {"args": {"model": "x", "max_num_seqs": 2}},
            64,
            r"model cannot be set: .*set rollout\.vllm\.max_num_seqs instead of args\.",
        ),
        ({"args": {"quantization": "nonsense"}}, 64, r"vLLM cannot start: .*nonsense"),
        ({}, 30_000, r"vLLM cannot start: .*max_model_len \(30000\).*20000"),
        ({"kv_cache_memory_bytes": 1 << 20}, 20_000, r"vLLM cannot start: .*KV cache.*max_model_len"),
        ({"kv_cache_memory_bytes": 1 << 50}, 64, r"vLLM cannot start: .*kv-cache-memory-bytes"),
        (
            {"kv_cache_memory_bytes": 1 << 20, "mode": "process"},
            20_000,
            r"vLLM cannot start: .*KV cache.*max_model_len",
        ),
    ],
    ids=[
        "unknown argument",
        "our arguments",
        "nonsense",
        "model too short",
        "small cache",
        "out of memory",
        "small cache of a process",
    ],
)
def test_start_up_failures_have_one_readable_message(
    model: Path, options: dict[str, Any], max_model_len: int, message: str
) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        start(model, max_model_len, **options)
    assert "\n" not in str(caught.value)


def test_the_error_of_a_folder_without_a_model_names_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"vLLM cannot start: .*") as caught:
        start(tmp_path)
    assert str(tmp_path) in str(caught.value)


# --- effects of an engine in this process on the trainer ----------------------------------------------------------


def test_the_trainers_state_does_not_change(model: Path) -> None:
    torch.manual_seed(3)
    random.seed(3)
    set_num_threads = torch.set_num_threads
    expected = torch.get_rng_state(), random.getstate()
    engine = start(model)
    try:
        greedy = GenerationRequest([10, 20], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
        engine.generate_batch([greedy, request(8)])
        assert torch.equal(torch.get_rng_state(), expected[0])
        assert random.getstate() == expected[1]
        assert torch.set_num_threads is set_num_threads
    finally:
        engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate_batch([request(1)])


def test_closing_fails_unfinished_requests_and_level_2_waits_for_weights(
    model: Path, weights: list[WeightBucket]
) -> None:
    engine = start(model, sleep_level=2)
    before = engine.generate_batch([request(6)])[0].tokens
    engine.sleep()
    with pytest.raises(EngineError, match=r"sleep dropped the weights \(sleep_level 2\)"):
        engine.generate_batch([request(6)])
    engine.update_weights(weights, 1)
    assert engine.generate_batch([request(6)])[0].tokens == before

    async def scenario() -> None:
        running = asyncio.create_task(engine.generate(request(19_000)))
        await engine.generate(request(4))
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="closed"):
            await asyncio.wait_for(running, 60)

    asyncio.run(scenario())


# --- an engine process that dies or hangs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(model: Path) -> Iterator[VLLMRollout]:
    engine = start(model, mode="process", hang_timeout_s=20)
    yield engine
    engine.close()
    assert not engine_processes()


def engine_processes() -> list[psutil.Process]:
    """Running descendants of this process that vLLM started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "VLLM" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_killed_engine_is_replaced_at_the_next_update(apart: VLLMRollout, weights: list[WeightBucket]) -> None:
    before = apart.generate_batch([request(6)])[0].tokens

    async def scenario() -> None:
        running = asyncio.create_task(apart.generate(request(19_000)))
        finished = await apart.generate(request(4))
        (core,) = [process for process in engine_processes() if "EngineCore" in " ".join(process.cmdline())]
        core.kill()
        with pytest.raises(WorkerDied, match="the vLLM engine's process died"):
            await asyncio.wait_for(running, 120)
        assert len(finished.tokens) == 4

    asyncio.run(scenario())
    with pytest.raises(WorkerDied, match=r"died; .*; the next weight update starts another engine"):
        apart.generate_batch([request(1)])
    apart.update_weights(weights, 5)
    (after,) = apart.generate_batch([request(6)])
    assert after.tokens == before
    assert after.versions == [(5, 6)]


def test_another_engine_takes_over_from_a_killed_one(model: Path, weights: list[WeightBucket]) -> None:
    """It generates the unfinished requests with the same tokens, and the killed engine is replaced."""
    requests = [GenerationRequest([10, index], SamplingParams(1000, seed=index, ignore_eos=True)) for index in range(6)]
    settings = VLLMSettings(mode="process", replicas=2, kv_cache_memory_bytes=KV_CACHE_BYTES)
    others = engine_processes()
    engines = build(RolloutSpec(ModelSettings(path=str(model)), settings, 20_000))
    try:
        engines.update_weights(weights, 1)

        async def scenario() -> list[Completion]:
            running = [asyncio.create_task(engines.generate(request)) for request in requests]
            await engines.generate(request(4))
            own = [process for process in engine_processes() if process not in others]
            first, second = (process for process in own if "EngineCore" in " ".join(process.cmdline()))
            first.kill()
            made = [await asyncio.wait_for(task, 240) for task in running]
            assert second.is_running()
            return made

        made = asyncio.run(scenario())
        assert {tuple(completion.versions) for completion in made} == {((1, 1000),)}
        deadline = time.monotonic() + 240
        while "is back with weights of version 0" not in str(engines.reasons) and time.monotonic() < deadline:
            time.sleep(0.2)
        engines.update_weights(weights, 2)
        assert engines.reasons == {}
        again = engines.generate_batch(requests)
        assert [completion.tokens for completion in again] == [completion.tokens for completion in made]
    finally:
        engines.close()
    assert not [process for process in engine_processes() if process not in others]


def test_a_hung_engine_fails_its_requests(apart: VLLMRollout) -> None:
    async def scenario() -> None:
        running = asyncio.create_task(apart.generate(request(19_000)))
        await apart.generate(request(4))
        for process in engine_processes():
            os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(WorkerDied, match="process did not answer within 20 s"):
            await asyncio.wait_for(running, 180)

    asyncio.run(scenario())
    with pytest.raises(WorkerDied, match=r"did not answer within 20 s; the next weight update starts another engine"):
        apart.generate_batch([request(1)])
    deadline = time.monotonic() + 60
    while engine_processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not engine_processes()
