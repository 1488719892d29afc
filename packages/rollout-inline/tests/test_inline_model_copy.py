"""The inline rollout with a copy of the model: weight updates, refused updates, independence of process groups."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rlcore.engines import (
    Completion,
    GenerationRequest,
    ModelSettings,
    RolloutSpec,
    SamplingParams,
    WeightBucket,
)
from rlcore.errors import EngineError
from rlcore_inline.engine import InlineRollout, build
from rlcore_inline.settings import InlineSettings
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.testing.tiny_model import tiny_model

PROMPT = (5, 6, 7)
WAIT_S = 60


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tiny_model(tmp_path_factory.mktemp("model"), seed=seed, initializer_range=0.15) for seed in range(2)]


def make(path: Path, **settings: Any) -> InlineRollout:
    return build(RolloutSpec(ModelSettings(path=str(path)), InlineSettings(device="cpu", **settings), 512))


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights under every name, including those of tied weights."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def bucket(tensors: dict[str, torch.Tensor]) -> WeightBucket:
    return WeightBucket(tuple(tensors.items()))


def request(max_tokens: int, seed: int = 0, **changes: Any) -> GenerationRequest:
    return GenerationRequest(PROMPT, SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True), **changes)


def expected_logprobs(path: Path, completion: Completion) -> list[float]:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPT, *completion.tokens]])).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0].tolist()


# --- taking weights --------------------------------------------------------------------------------------------------


def test_it_starts_with_the_model_in_the_folder(paths: list[Path]) -> None:
    engine = make(paths[0])
    assert not engine.shares_weights
    assert (engine.dp_rank, engine.dp_size, engine.version) == (0, 1, 0)
    (completion,) = engine.generate_batch([request(20)])
    assert completion.logprobs == pytest.approx(expected_logprobs(paths[0], completion), abs=1e-5)


@pytest.mark.parametrize("left_out", [None, "lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_come_under_any_of_their_names(paths: list[Path], left_out: str | None) -> None:
    engine = make(paths[0])
    engine.update_weights([bucket({n: w for n, w in weights(paths[1]).items() if n != left_out})], 3)
    (completion,) = engine.generate_batch([request(20)])
    assert completion.versions == [(3, 20)]
    assert completion.logprobs == pytest.approx(expected_logprobs(paths[1], completion), abs=1e-5)


def test_the_sender_may_change_its_tensors_afterwards(paths: list[Path]) -> None:
    engine = make(paths[0])
    sent = weights(paths[1])
    engine.update_weights((bucket({name: tensor}) for name, tensor in sent.items()), 1)
    for tensor in sent.values():
        tensor.zero_()
    (completion,) = engine.generate_batch([request(20)])
    assert completion.logprobs == pytest.approx(expected_logprobs(paths[1], completion), abs=1e-5)


def test_precision(paths: list[Path]) -> None:
    engine = make(paths[0], dtype="bfloat16")
    engine.update_weights([bucket(weights(paths[1]))], 1)
    (completion,) = engine.generate_batch([request(20)])
    expected = expected_logprobs(paths[1], completion)
    assert completion.logprobs == pytest.approx(expected, abs=0.2)
    assert completion.logprobs != pytest.approx(expected, abs=1e-5)


def broken(path: Path, how: str) -> Iterator[WeightBucket]:
    tensors = weights(path)
    names = list(tensors)
    yield bucket({names[0]: tensors[names[0]]})
    if how == "unknown":
        yield bucket({"model.layers.7.mlp.up_proj.weight": torch.zeros(64, 32)})
    if how == "shape":
        yield bucket({"model.norm.weight": torch.zeros(31)})
    if how == "ended":
        raise ConnectionError("the trainer is gone")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("unknown", EngineError, r"holds model\.layers\.7\.mlp\.up_proj\.weight, which Qwen2ForCausalLM does not have"),
        ("shape", EngineError, r"model\.norm\.weight of shape \[31\], but the rollout's model has \[32\]"),
        ("missing", EngineError, r"lacks 25 of 26 parameters: model\.layers\.0\.self_attn\.q_proj\.weight, .*, …"),
        ("ended", ConnectionError, "the trainer is gone"),
    ],
)
def test_a_broken_update(paths: list[Path], how: str, error: type[Exception], message: str) -> None:
    """Nothing is generated with a mixture of weights; a complete update repairs it."""
    engine = make(paths[0])
    engine.update_weights([bucket(weights(paths[0]))], 1)
    with pytest.raises(error, match=message):
        engine.update_weights(broken(paths[1], how), 2)
    assert engine.version == 1
    with pytest.raises(EngineError, match="failed midway"):
        engine.generate_batch([request(5)])
    engine.update_weights([bucket(weights(paths[1]))], 3)
    (completion,) = engine.generate_batch([request(20)])
    assert completion.logprobs == pytest.approx(expected_logprobs(paths[1], completion), abs=1e-5)


def test_a_stream_that_fails_before_it_begins_does_no_harm(paths: list[Path]) -> None:
    def nothing() -> Iterator[WeightBucket]:
        raise ConnectionError("the trainer is gone")
        yield

    engine = make(paths[0])
    (before,) = engine.generate_batch([request(20)])
    with pytest.raises(ConnectionError):
        engine.update_weights(nothing(), 2)
    assert engine.generate_batch([request(20)]) == [before]


def test_a_missing_model_fails_at_build(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not exist"):
        make(tmp_path / "nothing")


def test_sleep_keeps_weights_and_takes_new_ones(paths: list[Path]) -> None:
    engine = make(paths[0])
    engine.wake()
    engine.sleep()
    assert engine._cache is None
    engine.update_weights([bucket(weights(paths[1]))], 1)
    assert engine._cache is None
    (completion,) = engine.generate_batch([request(20)])
    assert completion.logprobs == pytest.approx(expected_logprobs(paths[1], completion), abs=1e-5)


# --- while weights come in -------------------------------------------------------------------------------------------


def test_other_calls_do_not_wait_for_the_stream(paths: list[Path]) -> None:
    """The event loop that feeds the stream submits, aborts and cancels requests meanwhile."""
    engine = make(paths[0])
    under_way, go_on = threading.Event(), threading.Event()

    def stream() -> Iterator[WeightBucket]:
        under_way.set()
        assert go_on.wait(WAIT_S)
        yield bucket(weights(paths[1]))

    async def scenario() -> list[Completion]:
        first = asyncio.create_task(engine.generate(request(400, request_id="first")))
        doomed = asyncio.create_task(engine.generate(request(400, request_id="doomed")))
        await engine.generate(request(5))
        update = asyncio.create_task(asyncio.to_thread(engine.update_weights, stream(), 1))
        assert await asyncio.to_thread(under_way.wait, WAIT_S)
        late = asyncio.create_task(engine.generate(request(6, seed=2)))
        cancelled = asyncio.create_task(engine.generate(request(6)))
        await asyncio.sleep(0.05)
        engine.abort(["doomed"])
        cancelled.cancel()
        early = await doomed
        engine.pause()
        engine.resume()
        assert not late.done()
        go_on.set()
        await update
        return [early, await late, await first]

    early, late, first = asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert early.finish_reason == "abort"
    assert [version for version, _ in early.versions] == [0]
    assert late.versions == [(1, 6)]
    assert [version for version, _ in first.versions] == [0, 1]
    assert len(first.tokens) == 400


def test_requests_of_many_threads_survive_updates(paths: list[Path], tmp_path: Path) -> None:
    """Every token has the log-prob of the weights that its span names, given all tokens before it; none is lost."""
    threads, each, updates = 3, 12, 4
    models = [*paths, *(tiny_model(tmp_path / str(seed), seed=seed, initializer_range=0.15) for seed in (2, 3, 4))]
    engine = make(models[0], max_running=24, kv_cache_tokens=4096)  # some wait, and some are preempted
    completions: dict[tuple[int, int], Completion] = {}

    def ask(thread: int) -> None:
        async def all_of_them() -> None:
            tasks = [
                engine.generate(request(40 + 7 * index, seed=100 * thread + index, request_id=f"{thread}-{index}"))
                for index in range(each)
            ]
            for index, completion in enumerate(await asyncio.gather(*tasks)):
                completions[thread, index] = completion

        asyncio.run(asyncio.wait_for(all_of_them(), WAIT_S))

    engine.pause()
    askers = [threading.Thread(target=ask, args=(thread,)) for thread in range(threads)]
    for asker in askers:
        asker.start()
    while len(engine._scheduler.waiting) < threads * each:
        assert all(asker.is_alive() for asker in askers)
    engine.resume()
    for version in range(1, updates + 1):
        engine.generate_batch([request(8, seed=version, priority=-1)])  # so that all running ones get 8 more tokens
        tensors = list(weights(models[version]).items())
        if version == 2:
            engine.abort(["0-11"])
        if version == 3:
            engine.pause()
        engine.update_weights((WeightBucket(tuple(tensors[i : i + 5])) for i in range(0, len(tensors), 5)), version)
        if version == 3:
            engine.resume()
    for asker in askers:
        asker.join(WAIT_S)
    assert len(completions) == threads * each

    seen: set[int] = set()
    for (thread, index), completion in completions.items():
        aborted = (thread, index) == (0, 11)
        assert completion.finish_reason == ("abort" if aborted else "length")
        assert len(completion.logprobs) == len(completion.tokens)
        assert aborted or len(completion.tokens) == 40 + 7 * index
        versions = [version for version, _ in completion.versions]
        assert versions == sorted(set(versions))
        assert sum(count for _, count in completion.versions) == len(completion.tokens)
        start = 0
        for version, count in completion.versions:
            expected = expected_logprobs(models[version], completion)[start : start + count]
            assert completion.logprobs[start : start + count] == pytest.approx(expected, abs=1e-5)
            start += count
        seen.update(versions)
    assert seen == set(range(updates + 1))
    assert sum(len(completion.versions) > 1 for completion in completions.values()) >= 20


# --- alone among processes -------------------------------------------------------------------------------------------


def generate_alone(path: Path, other: Path) -> dict[str, Any] | None:
    """Run everything on rank 1 and nothing on rank 0: a collective operation would never end."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    if dist.get_rank() == 0:
        return None
    engine = make(path)
    engine.wake()
    (before,) = engine.generate_batch([request(10)])
    engine.update_weights([bucket(weights(other))], 1)
    (after,) = engine.generate_batch([request(10)])
    single = asyncio.run(engine.generate(request(10)))
    engine.sleep()
    engine.close()
    return {"ranks": (engine.dp_rank, engine.dp_size), "before": before, "after": after, "single": single}


@pytest.fixture
def ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def test_a_model_copy_ignores_process_groups(ranks: RankPool, paths: list[Path]) -> None:
    _, found = ranks.run(generate_alone, *paths)
    assert found["ranks"] == (0, 1)
    engine = make(paths[0])
    assert engine.generate_batch([request(10)])[0].tokens == found["before"].tokens
    engine.update_weights([bucket(weights(paths[1]))], 1)
    assert engine.generate_batch([request(10)]) == [found["after"]] == [found["single"]]
