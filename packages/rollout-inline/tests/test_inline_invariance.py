"""`batch_invariant`: the same bits whatever else runs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.engines import Completion, GenerationRequest, ModelSettings, RolloutSpec, SamplingParams, WeightBucket
from rlcore.errors import EngineError
from rlcore_inline import scheduler
from rlcore_inline.engine import InlineRollout, build
from rlcore_inline.settings import InlineSettings
from rlcore_kit.testing.tiny_model import tiny_model

TARGETS = [(1, 30), (3, 450), (17, 60), (200, 20), (350, 90), (383, 40), (600, 60)]  # prompt, completion


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that matrix kernels differ for few rows and many."""
    return tiny_model(
        tmp_path_factory.mktemp("model"),
        hidden_size=128,
        intermediate_size=256,
        max_position_embeddings=2048,
        initializer_range=0.1,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(path: Path, **settings: Any) -> InlineRollout:
    chosen = InlineSettings(**{"device": "cpu", "batch_invariant": True, **settings})
    return build(RolloutSpec(ModelSettings(path=str(path)), chosen, 1024))


def request(seed: int, prompt: int, length: int, **changes: Any) -> GenerationRequest:
    drawn = random.Random(seed)
    tokens = [drawn.randrange(5, 250) for _ in range(prompt)]
    return GenerationRequest(tokens, SamplingParams(max_tokens=length, seed=seed, ignore_eos=True, **changes))


@pytest.fixture(scope="module", params=["direct", "generic"])
def decoder(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(path: Path, decoder: str) -> list[Completion]:
    """Generate each target in a separate engine."""
    return [
        make(path, decoder=decoder).generate_batch([request(seed, *target)])[0] for seed, target in enumerate(TARGETS)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_running": 1},
        {"max_running": 5, "prefill_tokens": 300},
        {"kv_cache_tokens": 3072},
    ],
    ids=str,
)
@pytest.mark.parametrize("company", [0, 4, 40])
def test_company_does_not_matter(
    path: Path, decoder: str, alone: list[Completion], settings: dict[str, Any], company: int
) -> None:
    drawn = random.Random(company)
    others = [
        request(100 + i, drawn.choice((1, 5, 90, 400)), drawn.choice((5, 50, 120)), temperature=drawn.choice((1, 0.7)))
        for i in range(company)
    ]
    requests = [*(request(seed, *target) for seed, target in enumerate(TARGETS)), *others]
    order = list(range(len(requests)))
    drawn.shuffle(order)
    completions = make(path, decoder=decoder, **settings).generate_batch([requests[index] for index in order])
    by_index = dict(zip(order, completions))
    assert [by_index[index] for index in range(len(TARGETS))] == alone


def test_without_it_bits_depend_on_company(path: Path) -> None:
    """What the other tests exclude does happen: if it no longer did, the setting could go."""
    engine = make(path, batch_invariant=False)
    requests = [request(seed, *target) for seed, target in enumerate(TARGETS)]
    (alone,) = engine.generate_batch(requests[:1])
    together = engine.generate_batch(requests)[0]
    assert together.tokens == alone.tokens
    assert together.logprobs != alone.logprobs
    assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_stop_strings_of_requests_that_gave_way(path: Path) -> None:
    """Their stop strings are searched again from the start."""
    free = make(path)
    whole = free.generate_batch([request(seed, 20, 300) for seed in range(8)])
    tokenizer = free._load_tokenizer()
    requests = []
    for seed, completion in enumerate(whole):
        stop = tokenizer.decode(completion.tokens[200:204], skip_special_tokens=False)
        requests.append(request(seed, 20, 300, stop=(stop,)))
    expected = free.generate_batch(requests)
    assert sum(completion.finish_reason == "stop" for completion in expected) >= 4
    assert make(path, kv_cache_tokens=1024).generate_batch(requests) == expected


def test_tokens_of_older_weights_are_never_drawn_again(path: Path, tmp_path: Path) -> None:
    """A request that is preempted after an update keeps the tokens of the older weights."""
    from transformers import AutoModelForCausalLM

    other = tiny_model(
        tmp_path, seed=1, hidden_size=128, intermediate_size=256, max_position_embeddings=2048, initializer_range=0.1
    )
    engine = make(path, kv_cache_tokens=2048)
    done: dict[int, Completion] = {}
    for seed in range(6):
        engine._submit(request(seed, 20, 500), lambda completion, seed=seed: done.__setitem__(seed, completion))
    for _ in range(60):
        assert engine._advance()
    before = {sequence.request.sampling.seed: list(sequence.tokens) for sequence in engine._scheduler.running}
    assert len(before) == 6
    weights = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).state_dict()
    engine.update_weights([WeightBucket(tuple(weights.items()))], 1)
    while engine._scheduler.unfinished:
        assert engine._advance()
    for seed, completion in done.items():
        assert completion.tokens[:60] == before[seed]
        assert completion.versions == [(0, 60), (1, 440)]
    assert len(done) == 6


def test_it_is_refused_where_it_cannot_be_had(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MIN_ROWS", 1)
    with pytest.raises(EngineError, match=r"batch_invariant is not available: with Qwen2ForCausalLM in float32"):
        make(path)


def test_it_is_refused_in_other_precisions(path: Path) -> None:
    with pytest.raises(EngineError, match="in bfloat16 on cpu"):
        make(path, dtype="bfloat16")
