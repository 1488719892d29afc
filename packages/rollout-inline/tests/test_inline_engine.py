"""Behaviour of the inline rollout that the contract does not define: scheduling, memory, weights, errors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from rlcore.engines import (
    GenerationRequest,
    ModelSettings,
    RolloutEngine,
    RolloutSpec,
    SamplingParams,
    WeightBucket,
)
from rlcore.errors import EngineError
from rlcore.plugins import get
from rlcore_inline.direct import DirectDecoder
from rlcore_inline.engine import InlineRollout, build
from rlcore_inline.settings import InlineSettings
from rlcore_kit.testing.tiny_model import tiny_model

MAX_LEN = 512


class Source:
    dp_rank, dp_size, device = 0, 1, torch.device("cpu")

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.step_count = 0
        self.held = 0
        self.taken = 0

    @contextmanager
    def generation_weights(self) -> Iterator[Any]:
        self.held += 1
        self.taken += 1
        yield self.model
        self.held -= 1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.15)


@pytest.fixture
def source(path: Path) -> Source:
    return Source(path)


def make(source: Any, path: Path, max_model_len: int = MAX_LEN, **settings: Any) -> InlineRollout:
    return build(RolloutSpec(ModelSettings(path=str(path)), InlineSettings(**settings), max_model_len, 0, source))


def request(max_tokens: int, prompt: tuple[int, ...] = (5, 6, 7), **changes: Any) -> GenerationRequest:
    seed = changes.pop("seed", 0)
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)
    return GenerationRequest(prompt, sampling, **changes)


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record the shapes of all prefills."""
    shapes: list[tuple[int, int]] = []
    original = DirectDecoder.prefill

    def prefill(self: DirectDecoder, tokens: torch.Tensor, step: Any) -> None:
        shapes.append(tuple(tokens.shape))
        original(self, tokens, step)

    monkeypatch.setattr(DirectDecoder, "prefill", prefill)
    return shapes


# --- building --------------------------------------------------------------------------------------------------------


def test_the_plugin_builds_the_engine(source: Source, path: Path) -> None:
    plugin = get("rlcore.rollout_engines", "inline")
    engine = plugin.build(RolloutSpec(ModelSettings(path=str(path)), plugin.config_class()(), MAX_LEN, 0, source))
    assert isinstance(engine, RolloutEngine)
    assert engine.shares_weights
    assert (engine.dp_rank, engine.dp_size) == (0, 1)


def test_an_engine_that_does_not_lend_its_weights_is_refused(path: Path) -> None:
    with pytest.raises(EngineError, match="object does not lend its weights"):
        make(object(), path)


@pytest.mark.parametrize("wrong", [{"max_running": 0}, {"decoder": "fast"}, {"kv_cache_fraction": 1.5}, {"slots": 1}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        InlineSettings(**wrong)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in InlineSettings.model_fields.values())


# --- scheduling ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_once_for_its_group(source: Source, path: Path, prefilled: list[tuple[int, int]]) -> None:
    engine = make(source, path)
    engine.wake()
    prefilled.clear()  # the decoder's check
    engine.generate_batch([request(4, seed=i, group=0) for i in range(6)])
    assert prefilled == [(1, 2)]
    prefilled.clear()
    engine.generate_batch([request(4, prompt=(9, *range(10, 10 + i // 3 * 4), 8), seed=i) for i in range(9)])
    assert sum(rows for rows, _ in prefilled) == 3


def test_late_members_of_a_group_copy_the_prompt_of_a_running_one(
    source: Source, path: Path, prefilled: list[tuple[int, int]]
) -> None:
    requests = [request(10 + 3 * i, seed=i) for i in range(12)]
    expected = make(source, path).generate_batch(requests)
    engine = make(source, path, max_running=4)
    engine.wake()
    prefilled.clear()
    completions = engine.generate_batch(requests)
    assert prefilled == [(1, 2)]
    assert [c.tokens for c in completions] == [c.tokens for c in expected]


def test_prefills_respect_their_budget(source: Source, path: Path, prefilled: list[tuple[int, int]]) -> None:
    prompts = [tuple(range(5, 5 + length)) for length in (200, 3, 90, 40, 41, 40, 3, 120)]
    engine = make(source, path, prefill_tokens=100)
    engine.wake()
    prefilled.clear()
    engine.generate_batch([request(2, prompt=prompt) for prompt in prompts])
    assert sum(rows for rows, _ in prefilled) == len(set(prompts)) == 6
    assert all(rows * length <= 100 or rows == 1 for rows, length in prefilled)


def test_rows_are_preempted_when_memory_is_short(source: Source, path: Path, prefilled: list[tuple[int, int]]) -> None:
    """512 positions for 10 sequences of up to 300: some are preempted and prefilled again."""
    requests = [request(250 + 5 * i, prompt=tuple(range(5, 9 + i)), seed=i) for i in range(10)]
    expected = make(source, path).generate_batch(requests)
    engine = make(source, path, kv_cache_tokens=512)
    engine.wake()
    prefilled.clear()
    completions = engine.generate_batch(requests)
    assert sum(rows for rows, _ in prefilled) > 10
    for completion, alone in zip(completions, expected, strict=True):
        assert completion.tokens == alone.tokens
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_requests_run_by_priority_then_arrival(source: Source, path: Path) -> None:
    engine = make(source, path, max_running=1)
    order: list[str] = []

    async def run(name: str, priority: int) -> None:
        await engine.generate(replace(request(3), request_id=name, priority=priority))
        order.append(name)

    async def scenario() -> None:
        await asyncio.gather(run("a", 0), run("b", 1), run("c", 0), run("urgent", -1), run("d", 1))

    asyncio.run(scenario())
    assert order == ["urgent", "a", "c", "b", "d"]


def test_batches_may_be_generated_inside_a_running_event_loop(source: Source, path: Path) -> None:
    engine = make(source, path)

    async def scenario() -> list[Any]:
        single = asyncio.create_task(engine.generate(request(30)))
        await asyncio.sleep(0)
        batch = engine.generate_batch([request(5), request(6)])
        return [*batch, await single]

    assert [len(c.tokens) for c in asyncio.run(scenario())] == [5, 6, 30]


def test_other_threads_may_pause_resume_and_abort(source: Source, path: Path) -> None:
    engine = make(source, path)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(engine.generate_batch([request(500), request(500)])))
    engine.pause()
    thread.start()
    time.sleep(0.2)
    assert not results
    engine.resume()
    time.sleep(0.05)
    engine.abort()
    thread.join(30)
    assert [c.finish_reason for c in results] == ["abort"] * 2


# --- weights and memory ----------------------------------------------------------------------------------------------


def test_weights_are_held_only_while_there_are_requests_or_by_wake(source: Source, path: Path) -> None:
    engine = make(source, path)
    engine.generate_batch([request(3)])
    assert source.held == 0
    asyncio.run(engine.generate(request(3)))
    assert source.held == 0
    engine.wake()
    engine.generate_batch([request(3)])
    assert source.held == 1
    engine.sleep()
    assert source.held == 0
    assert engine._cache is None


def test_changed_weights_are_detected(source: Source, path: Path) -> None:
    engine = make(source, path)
    engine.wake()
    (before,) = engine.generate_batch([request(20)])
    with torch.no_grad():
        source.model.model.layers[0].mlp.gate_proj.weight = torch.nn.Parameter(torch.randn(64, 32))
    source.step_count += 1
    (after,) = engine.generate_batch([request(20)])
    assert before.tokens != after.tokens
    (fresh,) = make(source, path).generate_batch([request(20)])
    assert after.tokens == fresh.tokens


def test_unfinished_requests_go_on_exactly_under_new_weights(source: Source, path: Path) -> None:
    """After an update the past is computed again, so that log-probs are those of the new weights alone."""
    engine = make(source, path)

    async def scenario() -> Any:
        task = asyncio.create_task(engine.generate(request(120)))
        await engine.generate(request(20, seed=1))
        for parameter in source.model.parameters():
            parameter.data *= 1.05
        source.step_count += 1
        engine.update_weights((), 3)
        return await task

    completion = asyncio.run(scenario())
    (_, old), (version, new) = completion.versions
    assert (version, old + new) == (3, 120)
    with torch.no_grad():
        logits = source.model(input_ids=torch.tensor([[5, 6, 7, *completion.tokens]])).logits[0, 2:-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
    assert completion.logprobs[old:] == pytest.approx(expected[old:].tolist(), abs=1e-5)
    assert completion.logprobs[:old] != pytest.approx(expected[:old].tolist(), abs=1e-3)


def test_buckets_are_refused_with_lent_weights(source: Source, path: Path) -> None:
    with pytest.raises(EngineError, match="without buckets"):
        make(source, path).update_weights([WeightBucket(())], 1)


def test_a_cache_too_small_for_one_sequence_is_refused(source: Source, path: Path) -> None:
    with pytest.raises(EngineError, match=r"a capacity of 256 tokens, but one sequence of max_model_len 512 needs 512"):
        make(source, path, kv_cache_tokens=256).wake()


# --- errors ----------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_fail_requests_not_the_engine(source: Source, path: Path) -> None:
    engine = make(source, path)
    engine.wake()
    norm = source.model.model.norm.weight
    good = norm.detach().clone()
    norm.data.fill_(torch.nan)

    async def scenario() -> list[Any]:
        return await asyncio.gather(*(engine.generate(request(5)) for _ in range(3)), return_exceptions=True)

    for error in asyncio.run(scenario()):
        assert isinstance(error, EngineError)
        assert "not finite" in str(error)
    with pytest.raises(EngineError, match="not finite"):
        engine.generate_batch([request(5)])
    norm.data.copy_(good)
    assert len(engine.generate_batch([request(5)])[0].tokens) == 5


@pytest.mark.parametrize("token", [-1, 261])
def test_tokens_outside_the_vocabulary_are_refused(source: Source, path: Path, token: int) -> None:
    engine = make(source, path)
    with pytest.raises(EngineError, match="outside the model's vocabulary of 261"):
        engine.generate_batch([request(5), request(5, prompt=(5, token))])
    assert not engine._scheduler.unfinished
    assert source.held == 0


def test_several_end_tokens(source: Source, path: Path) -> None:
    source.model.generation_config.eos_token_id = [1, *range(130, 261)]
    sampling = SamplingParams(max_tokens=200, seed=0)
    (completion,) = make(source, path).generate_batch([GenerationRequest((5, 6), sampling)])
    assert completion.finish_reason == "stop"
    assert completion.tokens[-1] >= 130
    assert all(token < 130 for token in completion.tokens[:-1])
