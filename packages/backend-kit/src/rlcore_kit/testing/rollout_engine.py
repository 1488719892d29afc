"""Conformance suite for rollout engines: subclass `RolloutEngineConformance` in a test module of the backend.

The reference is the forward pass of transformers in float32 over the engine's completions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from rlcore.engines.rollout import Completion, GenerationRequest, RolloutEngine, SamplingParams
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.testing.tiny_model import tiny_model

T = TypeVar("T")

MAX_MODEL_LEN = 4096
END = 1  # end of sequence of the tiny tokenizer
PROMPT = [10, 60, 110, 160, 210, 35, 85]


class RolloutEngineConformance:
    """Checks the contract of `RolloutEngine` on tiny models.

    Override `make_engine`, and `load_weights` unless ``update_weights`` takes buckets. All tests of the class share one
    engine. The engine computes in float32; raise ``logprob_tolerance`` if its arithmetic is less precise.
    """

    logprob_tolerance = 1e-4
    """Maximum difference of a log-prob to the reference."""
    timeout_s = 120.0
    """Timeout of a test that waits for completions, in seconds."""
    max_model_len = MAX_MODEL_LEN
    """Maximum length of the engine; raise it if such a completion ends before a test can abort or pause it."""
    draws = 4000
    """Number of tokens drawn for the comparison with the model's distribution; lower it if requests are slow."""

    def make_engine(self, model: Path, max_model_len: int) -> RolloutEngine:
        """Make an engine that generates with the model in the folder ``model``."""
        raise NotImplementedError

    def load_weights(self, engine: RolloutEngine, model: Path, version: int) -> None:
        """Make ``engine`` generate with the weights in ``model``, of the same architecture, as ``version``."""
        weights = _load(model).state_dict()
        weights.pop("lm_head.weight")  # tied
        engine.update_weights([WeightBucket(tuple(weights.items()))], version)

    # --- fixtures ----------------------------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Write the model of the engine and return its folder."""
        return _sharp_model(tmp_path_factory.mktemp("model"), seed=0)

    @pytest.fixture(scope="class")
    @classmethod
    def other_model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Write a model of the same architecture with other weights and return its folder."""
        return _sharp_model(tmp_path_factory.mktemp("other_model"), seed=1)

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, model: Path) -> Any:
        """Load the model in transformers."""
        return _load(model)

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, model: Path) -> Iterator[RolloutEngine]:
        """Make the engine that the tests share."""
        engine = cls().make_engine(model, cls.max_model_len)
        yield engine
        engine.close()

    # --- contents of a completion ------------------------------------------------------------------------------------

    def test_shape_of_a_completion(self, engine: RolloutEngine) -> None:
        request = GenerationRequest(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True, seed=0), request_id="one")
        (completion,) = engine.generate_batch([request])
        assert len(completion.tokens) == len(completion.logprobs) == 9
        assert all(isinstance(token, int) for token in completion.tokens)
        assert completion.finish_reason == "length"
        assert completion.versions == [(engine.version, 9)]
        assert completion.request_id == "one"

    def test_no_requests(self, engine: RolloutEngine) -> None:
        assert engine.generate_batch([]) == []

    def test_logprobs_only_if_asked_for(self, engine: RolloutEngine) -> None:
        (completion,) = engine.generate_batch([_request(5, logprobs=False)])
        assert len(completion.tokens) == 5
        assert completion.logprobs == []

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"temperature": 0.6},
            {"temperature": 1.7},
            {"temperature": 0.0},
            {"top_k": 7, "top_p": 0.8, "min_p": 0.1},
        ],
        ids=str,
    )
    def test_logprobs_are_those_of_the_model(
        self, engine: RolloutEngine, reference: Any, changes: dict[str, Any]
    ) -> None:
        requests = [_request(30, prompt=[*PROMPT, seed], seed=seed, **changes) for seed in range(4)]
        for request, completion in zip(requests, engine.generate_batch(requests)):
            self._check_logprobs(reference, request, completion)

    def test_many_requests_of_all_lengths(self, engine: RolloutEngine, reference: Any) -> None:
        """More requests than a small engine runs together, in groups that share a prompt, with mixed parameters."""
        requests = [
            replace(
                _request(1 + 7 * index % 40, prompt=[20 + index // 4] * (1 + index // 4), seed=index),
                group=index // 4,
                request_id=str(index),
            )
            for index in range(100)
        ]
        completions = engine.generate_batch(requests)
        for request, completion in zip(requests, completions, strict=True):
            assert completion.request_id == request.request_id
            assert len(completion.tokens) == request.sampling.max_tokens
            self._check_logprobs(reference, request, completion)

    def test_long_prompt(self, engine: RolloutEngine, reference: Any) -> None:
        request = _request(4, prompt=[(7 * index) % 250 + 5 for index in range(1500)])
        self._check_logprobs(reference, request, engine.generate_batch([request])[0])

    # --- sampling ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
    def test_greedy(self, engine: RolloutEngine, reference: Any, changes: dict[str, Any]) -> None:
        request = _request(40, **changes)
        (completion,) = engine.generate_batch([request])
        logits = _logits(reference, request, completion)
        chosen = logits.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert bool((chosen >= logits.max(-1).values - self.logprob_tolerance).all())

    def test_filters(self, engine: RolloutEngine, reference: Any) -> None:
        for changes in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}):
            requests = [_request(40, seed=seed, **changes) for seed in range(4)]
            for request, completion in zip(requests, engine.generate_batch(requests)):
                probs = _logits(reference, request, completion).softmax(-1)
                chosen = probs.gather(-1, torch.tensor(completion.tokens)[:, None])
                better = probs > chosen + self.logprob_tolerance
                if "top_k" in changes:
                    assert int(better.sum(-1).max()) < 3
                if "top_p" in changes:
                    assert float((probs * better).sum(-1).max()) < 0.5
                if "min_p" in changes:
                    assert float((chosen[:, 0] / probs.max(-1).values).min()) > 0.3 - self.logprob_tolerance

    def test_a_seed_gives_the_same_completion_in_any_batch(self, engine: RolloutEngine) -> None:
        request = _request(40, seed=5)
        (alone,) = engine.generate_batch([request])
        others = [_request(3 + 5 * index, prompt=[40 + index] * (index + 2), seed=index) for index in range(12)]
        together = engine.generate_batch([*others, request, *others])[len(others)]
        assert together.tokens == alone.tokens
        assert together.logprobs == pytest.approx(alone.logprobs, abs=self.logprob_tolerance)

    def test_other_seeds_give_other_completions(self, engine: RolloutEngine) -> None:
        completions = engine.generate_batch([_request(20, seed=seed) for seed in (1, 2, 3, None, None)])
        assert len({tuple(completion.tokens) for completion in completions}) == 5

    @pytest.mark.parametrize(
        "changes", [{}, {"temperature": 0.5}, {"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.05}], ids=str
    )
    def test_tokens_follow_the_distribution(
        self, engine: RolloutEngine, reference: Any, changes: dict[str, Any]
    ) -> None:
        """Draws with fixed seeds pass a χ² test at a significance of 1e-4."""
        draws = self.draws
        sampling = SamplingParams(max_tokens=1, ignore_eos=True, **changes)
        requests = [GenerationRequest(PROMPT, replace(sampling, seed=seed), group=0) for seed in range(draws)]
        counts = torch.zeros(_vocabulary(reference), dtype=torch.float64)
        for completion in engine.generate_batch(requests):
            counts[completion.tokens[0]] += 1
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([PROMPT])).logits[0, -1].double()
        expected = draws * _filtered((logits / sampling.temperature).softmax(-1), sampling)
        assert float(counts[expected == 0].sum()) == 0
        frequent = expected >= 8
        observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
        expected = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
        observed, expected = observed[expected > 0], expected[expected > 0]
        statistic = float(((observed - expected) ** 2 / expected).sum())
        assert statistic < _chi2_quantile(len(expected) - 1, z=3.72)

    # --- ends --------------------------------------------------------------------------------------------------------

    def test_end_of_sequence(self, engine: RolloutEngine) -> None:
        sampling = SamplingParams(max_tokens=300, temperature=1.5)
        requests = [GenerationRequest(PROMPT, replace(sampling, seed=seed)) for seed in range(16)]
        completions = engine.generate_batch(requests)
        assert {completion.finish_reason for completion in completions} == {"stop", "length"}
        for completion in completions:
            ended = completion.finish_reason == "stop"
            assert END not in completion.tokens[:-1]  # shift allowed: all but the end token
            assert (completion.tokens[-1] == END) == ended
            assert ended or len(completion.tokens) == 300
        ignoring = [replace(request, sampling=replace(request.sampling, ignore_eos=True)) for request in requests]
        for completion, longer in zip(completions, engine.generate_batch(ignoring)):
            assert longer.finish_reason == "length"
            assert len(longer.tokens) == 300
            assert longer.tokens[: len(completion.tokens)] == completion.tokens

    def test_stop_tokens(self, engine: RolloutEngine) -> None:
        (whole,) = engine.generate_batch([_request(30, seed=3)])
        stop = whole.tokens[12]
        (stopped,) = engine.generate_batch([_request(30, seed=3, stop_token_ids=(stop,))])
        assert stopped.finish_reason == "stop"
        assert stopped.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
        assert len(stopped.logprobs) == len(stopped.tokens)

    def test_stop_strings(self, engine: RolloutEngine, model: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        (whole,) = engine.generate_batch([_request(60, seed=4)])
        texts: list[str] = [tokenizer.decode([token]) for token in whole.tokens]
        pairs = [
            index
            for index, (first, second) in enumerate(pairwise(texts))
            if (first + second).isascii() and (first + second).isprintable()
        ]
        assert pairs, "the fixed seed gave no printable text"
        stop = texts[pairs[-1]] + texts[pairs[-1] + 1]  # shift allowed: texts of two tokens
        (stopped,) = engine.generate_batch([_request(60, seed=4, stop=("no such text", stop))])
        ends = next(end for end in range(1, len(texts) + 1) if stop in tokenizer.decode(whole.tokens[:end]))
        assert stopped.finish_reason == "stop"
        assert stopped.tokens == whole.tokens[:ends]

    def test_longest_model_length(self, engine: RolloutEngine) -> None:
        (completion,) = engine.generate_batch([_request(100, prompt=[9] * (self.max_model_len - 3))])
        assert completion.finish_reason == "length"
        assert len(completion.tokens) == 3

    @pytest.mark.parametrize("length", ["none", "all", "more"])
    def test_impossible_prompts(self, engine: RolloutEngine, length: str) -> None:
        prompt = [9] * {"none": 0, "all": self.max_model_len, "more": self.max_model_len + 1}[length]
        with pytest.raises(EngineError):
            engine.generate_batch([_request(1, prompt=prompt)])
        assert len(engine.generate_batch([_request(4)])[0].tokens) == 4

    # --- control -----------------------------------------------------------------------------------------------------

    def test_abort(self, engine: RolloutEngine) -> None:
        async def scenario() -> list[Completion]:
            running = [asyncio.create_task(engine.generate(self._endless(name))) for name in ("a", "b", "c")]
            for _ in range(3):  # on a busy machine requests to a server may overtake each other
                await engine.generate(_request(6))
            engine.abort(["b", "unknown"])
            first = await running[1]
            assert not running[0].done()
            assert not running[2].done()
            await engine.generate(_request(6))
            engine.abort()
            return [await running[0], first, await running[2]]

        completions = self._run(scenario())
        for name, completion in zip("abc", completions, strict=True):
            assert completion.request_id == name
            assert completion.finish_reason == "abort"
            assert 0 < len(completion.tokens) == len(completion.logprobs) < self.max_model_len - 1000
        assert len(completions[0].tokens) > len(completions[1].tokens)

    def test_pause_and_resume(self, engine: RolloutEngine) -> None:
        request = _request(50, seed=8)
        (undisturbed,) = engine.generate_batch([request])

        async def scenario() -> list[Completion]:
            running = [asyncio.create_task(engine.generate(self._endless("a")))]
            await engine.generate(_request(6))
            engine.pause()
            running.append(asyncio.create_task(engine.generate(request)))
            done, _ = await asyncio.wait(running, timeout=0.3)
            assert not done, "a paused engine finished a request"
            engine.resume()
            engine.resume()
            later = await running[1]
            engine.abort()
            return [await running[0], later]

        endless, later = self._run(scenario())
        assert later.tokens == undisturbed.tokens
        assert len(endless.tokens) > 0

    def test_new_weights(self, engine: RolloutEngine, model: Path, other_model: Path, reference: Any) -> None:
        request = _request(20, seed=1)
        (before,) = engine.generate_batch([request])
        try:
            self.load_weights(engine, other_model, 41)
            assert engine.version == 41
            (after,) = engine.generate_batch([request])
            assert after.versions == [(41, 20)]
            assert after.tokens != before.tokens
            self._check_logprobs(_load(other_model), request, after)
        finally:
            self.load_weights(engine, model, 42)
        (again,) = engine.generate_batch([request])
        assert again.tokens == before.tokens
        self._check_logprobs(reference, request, again)

    def test_new_weights_during_generation(
        self, engine: RolloutEngine, model: Path, other_model: Path, reference: Any
    ) -> None:
        """Tokens before an update have log-probs of the old weights, tokens after it of the new weights alone."""
        requests = [
            replace(self._endless(name), prompt=[30 + index] * (1 + 5 * index)) for index, name in enumerate("abcd")
        ]

        async def scenario() -> list[Completion]:
            running = [asyncio.create_task(engine.generate(request)) for request in requests]
            await engine.generate(_request(6))
            self.load_weights(engine, other_model, 51)
            await engine.generate(_request(6))
            engine.pause()
            self.load_weights(engine, model, 52)
            engine.resume()
            await engine.generate(_request(6))
            engine.abort([request.request_id for request in requests])
            return list(await asyncio.gather(*running))

        try:
            self.load_weights(engine, model, 50)
            completions = self._run(scenario())
        finally:
            self.load_weights(engine, model, 53)
        other = _load(other_model)
        for request, completion in zip(requests, completions, strict=True):
            assert completion.finish_reason == "abort"
            assert [version for version, _ in completion.versions] == [50, 51, 52]
            assert sum(count for _, count in completion.versions) == len(completion.tokens) == len(completion.logprobs)
            start = 0
            for version, count in completion.versions:
                assert count > 0
                logits = _logits(other if version == 51 else reference, request, completion)[start : start + count]
                tokens = torch.tensor(completion.tokens[start : start + count])
                expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
                found = completion.logprobs[start : start + count]
                assert found == pytest.approx(expected, abs=self.logprob_tolerance)
                start += count

    def test_sleep_and_wake(self, engine: RolloutEngine) -> None:
        request = _request(10, seed=2)
        (before,) = engine.generate_batch([request])
        version = engine.version
        engine.sleep()
        engine.sleep()
        engine.wake()
        engine.wake()
        assert engine.generate_batch([request])[0].tokens == before.tokens
        engine.sleep()
        assert engine.generate_batch([request])[0].tokens == before.tokens, "generate did not wake the engine"
        assert engine.version == version

    def test_one_event_loop_after_another(self, engine: RolloutEngine) -> None:
        first = self._run(engine.generate(_request(10, seed=6)))
        second = self._run(engine.generate(_request(10, seed=6)))
        assert first.tokens == second.tokens == engine.generate_batch([_request(10, seed=6)])[0].tokens

    def test_event_loops_of_several_threads(self, engine: RolloutEngine) -> None:
        requests = [[_request(20, prompt=[40 + thread, 9], seed=thread) for _ in range(2)] for thread in range(3)]
        alone = [engine.generate_batch(own) for own in requests]
        with ThreadPoolExecutor(len(requests)) as threads:
            together = list(threads.map(engine.generate_batch, requests))
        for found, expected in zip(together, alone, strict=True):
            assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]

    def test_cancelled_requests_are_forgotten(self, engine: RolloutEngine) -> None:
        async def scenario() -> Completion:
            running = asyncio.create_task(engine.generate(self._endless("a")))
            await engine.generate(_request(6))
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            return await engine.generate(replace(_request(5), request_id="a"))

        assert len(self._run(scenario()).tokens) == 5

    # --- support -----------------------------------------------------------------------------------------------------

    def _endless(self, request_id: str) -> GenerationRequest:
        """Make a request that is still running at the end of the test."""
        return replace(_request(self.max_model_len - 1000, prompt=[30, 31, 32]), request_id=request_id)

    def _run(self, scenario: Awaitable[T]) -> T:
        async def limited() -> T:
            return await asyncio.wait_for(scenario, self.timeout_s)

        return asyncio.run(limited())

    def _check_logprobs(self, reference: Any, request: GenerationRequest, completion: Completion) -> None:
        logits = _logits(reference, request, completion)
        temperature = request.sampling.temperature or 1.0
        expected = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=self.logprob_tolerance)


def _request(
    max_tokens: int, *, prompt: Sequence[int] = PROMPT, seed: int | None = 0, **changes: Any
) -> GenerationRequest:
    return GenerationRequest(prompt, SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **changes))


def _sharp_model(path: Path, seed: int) -> Path:
    """Write a model with large initial weights, so that distributions are far from uniform and depend on the past."""
    return tiny_model(path, seed=seed, initializer_range=0.15, max_position_embeddings=MAX_MODEL_LEN)


def _load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def _vocabulary(reference: Any) -> int:
    return int(reference.config.vocab_size)


@torch.no_grad()
def _logits(reference: Any, request: GenerationRequest, completion: Completion) -> torch.Tensor:
    """Return the logits ``[tokens, V]`` in float32 from which each token of the completion was drawn."""
    sequence = torch.tensor([[*request.prompt, *completion.tokens]])
    logits: torch.Tensor = reference(input_ids=sequence).logits[0, len(request.prompt) - 1 : -1]
    return logits


def _filtered(probs: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Return ``probs`` ``[V]`` after top-k, top-p and min-p, computed token by token from the definitions."""
    kept: list[int] = []
    ranked = sorted(range(len(probs)), key=lambda token: -float(probs[token]))[: sampling.top_k or None]
    total = sum(float(probs[token]) for token in ranked)
    mass = 0.0
    for token in ranked:
        if kept and (mass >= sampling.top_p or float(probs[token]) < sampling.min_p * float(probs[ranked[0]])):
            break
        kept.append(token)
        mass += float(probs[token]) / total
    result = torch.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


def _chi2_quantile(degrees: int, z: float) -> float:
    """Return the χ² quantile at which a standard normal reaches ``z`` (Wilson & Hilferty, 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + z * (2 / (9 * degrees)) ** 0.5) ** 3  # type: ignore[no-any-return]
