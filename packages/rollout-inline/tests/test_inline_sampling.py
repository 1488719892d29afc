"""The inline rollout's random numbers and its vectorised sampler, against plain Python."""

import math

import pytest
import torch

from rlcore.engines import SamplingParams
from rlcore_inline import sampling
from rlcore_inline.sampling import Sampler
from rlcore_inline.seeds import splitmix64, stream_start, uniforms

CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def reference_splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published (https://prng.di.unimi.it/splitmix64.c), state and all."""
    state, outputs = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def test_splitmix64_gives_the_published_numbers() -> None:
    assert reference_splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    for seed in (0, 1234567, MASK, 1 << 63):
        start = seed - (1 << 64) if seed >> 63 else seed
        draws = torch.arange(50)
        ours = splitmix64(torch.full((50,), start, dtype=torch.int64), draws)
        assert [value & MASK for value in ours.tolist()] == reference_splitmix64(seed, 50)


def test_uniforms_are_uniform_and_independent_across_seeds_and_draws() -> None:
    starts = torch.tensor([stream_start(seed) for seed in range(400)])[:, None].expand(-1, 50)
    values = uniforms(starts.reshape(-1), torch.arange(50).repeat(400)).view(400, 50)
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    assert bool((values * 2**52 == (values * 2**52).round()).all())
    counts = torch.histc(values, bins=64, min=0, max=1)
    statistic = float(((counts - values.numel() / 64) ** 2 / (values.numel() / 64)).sum())
    assert statistic < 63 + 4 * math.sqrt(2 * 63)
    for series in (values, values.T):  # neighbours: correlation of n pairs has standard deviation 1/√n
        pairs = torch.stack([series[:, :-1].reshape(-1), series[:, 1:].reshape(-1)])
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / math.sqrt(pairs.shape[1])


def pick(probs: list[float], params: SamplingParams, uniform: float) -> int:
    """The token at ``uniform`` of the filtered distribution: sampling by its definition, one token at a time."""
    if params.temperature == 0:
        return max(range(len(probs)), key=lambda token: probs[token])
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    if not (0 < params.top_k < len(probs) or params.top_p < 1 or params.min_p > 0):
        kept = list(range(len(probs)))
    else:
        kept, mass = [], 0.0
        ranked = ranked[: params.top_k or None]
        total = math.fsum(probs[token] for token in ranked)
        for token in ranked:
            if kept and (mass >= params.top_p * total or probs[token] < params.min_p * probs[ranked[0]]):
                break
            kept.append(token)
            mass += probs[token]
    target, reached = uniform * math.fsum(probs[token] for token in kept), 0.0
    for token in kept:
        reached += probs[token]
        if reached > target:
            return token
    raise AssertionError("uniform is below 1")


PARAMS = [
    SamplingParams(1),
    SamplingParams(1, temperature=0),
    SamplingParams(1, temperature=0.5),
    SamplingParams(1, top_k=4),
    SamplingParams(1, temperature=2.0, top_p=0.6),
    SamplingParams(1, min_p=0.2),
    SamplingParams(1, temperature=1.3, top_k=20, top_p=0.9, min_p=0.01),
    SamplingParams(1, temperature=0, top_k=3),
    SamplingParams(1, top_k=1),
    SamplingParams(1, top_k=10_000),
]


@pytest.mark.parametrize("chunk", [1 << 24, 50 * 7])
def test_rows_of_all_kinds_sample_as_defined(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", chunk)  # the second: seven rows at a time
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        logits = 3 * torch.randn(len(PARAMS), 50, generator=generator)
        uniform = torch.rand(len(PARAMS), dtype=torch.float64, generator=generator)
        tokens, logprobs = Sampler.build(PARAMS, 50, CPU).sample(logits, uniform)
        for row, params in enumerate(PARAMS):
            whole = (logits[row].double() / (params.temperature or 1)).log_softmax(-1)
            assert int(tokens[row]) == pick(whole.exp().tolist(), params, float(uniform[row]))
            assert float(logprobs[row]) == pytest.approx(float(whole[tokens[row]]), abs=2e-6)


def test_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -30.0, -math.inf]] * 2)
    uniform = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    tokens, _ = Sampler.build([SamplingParams(1)] * 2, 4, CPU).sample(logits, uniform)
    assert tokens.tolist() == [1, 2], "impossible tokens are never drawn, the last possible one can be"


def test_logits_that_are_no_numbers_give_a_token_in_range() -> None:
    logits = torch.full((1, 8), math.nan)
    tokens, logprobs = Sampler.build([SamplingParams(1)], 8, CPU).sample(logits, torch.tensor([0.5]).double())
    assert 0 <= int(tokens[0]) < 8
    assert math.isnan(float(logprobs[0]))


def test_logprobs_of_many_tokens_have_no_bias() -> None:
    """A float32 softmax over a large vocabulary sums to 1 only within 1e-5; log-probs must not inherit that."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 150_000, generator=generator)
    params = [SamplingParams(max_tokens=1, temperature=temperature) for temperature in (1.0, 0.7)] * 32
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    tokens, logprobs = Sampler.build(params, 150_000, CPU).sample(logits, uniform)
    heated = logits / torch.tensor([p.temperature for p in params])[:, None]
    exact = heated.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert abs(float((logprobs - exact).mean())) < 1e-7
    assert float((logprobs - exact).abs().max()) < 1e-6
