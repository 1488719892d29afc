"""vLLM under the conformance kit and more: in this process, and in separate processes with tensor parallelism."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.sampling_params import StructuredOutputsParams

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
from rlcore_kit.testing.rollout_engine import MAX_MODEL_LEN, RolloutEngineConformance
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_vllm.engine import VLLMRollout, build
from rlcore_vllm.settings import VLLMSettings

KV_CACHE_BYTES = 64 << 20
BLOCK = 128
"""Tokens in a block of vLLM's prefix cache on the CPU."""
HEADS = {"architecture": "Llama", "head_dim": 32}


class VLLMConformance(RolloutEngineConformance):
    """The kit with heads of size 32: vLLM's attention on the CPU has no kernel for the kit's size of 8."""

    options: ClassVar[dict[str, Any]] = {}

    def make_engine(self, model: Path, max_model_len: int) -> RolloutEngine:
        settings = VLLMSettings(kv_cache_memory_bytes=KV_CACHE_BYTES, **self.options)
        return build(RolloutSpec(ModelSettings(path=str(model)), settings, max_model_len))

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return sharp_model(tmp_path_factory.mktemp("model"), seed=0)

    @pytest.fixture(scope="class")
    @classmethod
    def other_model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return sharp_model(tmp_path_factory.mktemp("other_model"), seed=1)

    # --- weights -----------------------------------------------------------------------------------------------------

    def test_ten_steps_of_an_optimizer(self, engine: RolloutEngine, model: Path) -> None:
        try:
            take_ten_steps(engine, model)
        finally:
            self.load_weights(engine, model, 120)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"), "lacks weights of 1 layer"),
            (lambda weights: weights.pop("model.norm.weight"), "lacks weights of 1 layer.*norm"),
            (lambda weights: weights.update({"model.norm.wait": torch.ones(32)}), r"cannot load model\.norm\.wait"),
            (lambda weights: weights.update({"model.norm.weight": torch.ones(33)}), r"of shape \[33\]"),
        ],
        ids=["half a fused layer", "a missing norm", "an unknown name", "another shape"],
    )
    def test_weights_of_another_model_are_refused(
        self, engine: RolloutEngine, model: Path, change: Callable[[dict[str, Any]], None], message: str
    ) -> None:
        before = engine.generate_batch([request(8)])[0].tokens
        weights = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
        change(weights)
        with pytest.raises(EngineError, match=message):
            engine.update_weights([WeightBucket(tuple(weights.items()))], 130)
        with pytest.raises(EngineError, match="weight update 130 failed midway; update the weights again"):
            engine.generate_batch([request(8)])
        self.load_weights(engine, model, 131)
        assert engine.generate_batch([request(8)])[0].tokens == before

    # --- beyond the contract -----------------------------------------------------------------------------------------

    def test_further_sampling_fields_of_vllm(self, engine: VLLMRollout, reference: Any) -> None:
        asked = request(4, prompt=[10, 20, 30])
        made, output = asyncio.run(engine.generate_with(asked, {"logprobs": 3, "prompt_logprobs": 0}))
        assert largest_difference(reference, asked, made) < 1e-4
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([[*asked.prompt, *made.tokens]])).logits[0].log_softmax(-1)
        best = logits[2].topk(3)
        first = output.outputs[0].logprobs[0]
        assert {token: first[token].logprob for token in best.indices.tolist()} == pytest.approx(
            dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)), abs=1e-4
        )
        assert output.prompt_logprobs[2][30].logprob == pytest.approx(float(logits[1, 30]), abs=1e-4)
        with pytest.raises(EngineError, match="vLLM refuses"):
            asyncio.run(engine.generate_with(asked, {"no_such_field": 1}))

    def test_structured_output(self, engine: VLLMRollout, model: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        choice = StructuredOutputsParams(choice=["yes", "no"])
        made, _ = asyncio.run(
            engine.generate_with(
                GenerationRequest([10, 20], SamplingParams(max_tokens=8, seed=1)), {"structured_outputs": choice}
            )
        )
        assert tokenizer.decode(made.tokens, skip_special_tokens=True) in ("yes", "no")

    def test_lower_priorities_run_first(self, engine: VLLMRollout) -> None:
        """More requests than are decoded together: the last one overtakes all that wait."""
        running = VLLMSettings().max_num_seqs
        finished = list[int]()

        async def generate(index: int, priority: int) -> None:
            await engine.generate(replace(request(32, seed=index), priority=priority))
            finished.append(index)

        async def scenario() -> None:
            last = running + 50
            await asyncio.gather(*(generate(index, 0 if index == last else 1) for index in range(last + 1)))
            assert last in finished[: running + 1], finished.index(last)

        asyncio.run(scenario())

    def test_a_second_turn_computes_only_what_is_new(self, engine: VLLMRollout, reference: Any) -> None:
        first = request(100, prompt=[10 + index % 200 for index in range(200)])
        made, _ = asyncio.run(engine.generate_with(first, {}))
        before = [*first.prompt, *made.tokens]
        second = request(4, prompt=[*before, 20, 21, 22])
        again, output = asyncio.run(engine.generate_with(second, {}))
        assert len(before) - BLOCK <= output.num_cached_tokens <= len(before)
        assert largest_difference(reference, second, again) < 1e-4


class TestInProcess(VLLMConformance):
    pass


class TestSeparateProcess(VLLMConformance):
    options: ClassVar[dict[str, Any]] = {"mode": "process"}
    draws = 1000


class TestTensorParallel:
    """Two workers, which are slow on two cores."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return sharp_model(tmp_path_factory.mktemp("model"), seed=0)

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, model: Path) -> Iterator[RolloutEngine]:
        settings = VLLMSettings(mode="process", tensor_parallel_size=2, kv_cache_memory_bytes=KV_CACHE_BYTES)
        engine = build(RolloutSpec(ModelSettings(path=str(model)), settings, MAX_MODEL_LEN))
        yield engine
        engine.close()

    def test_workers_leave_no_shared_memory_behind(self, engine: RolloutEngine) -> None:
        """What they share has no name any more, so that it goes with them, however they end."""
        children = psutil.Process().children(recursive=True)
        maps = [mapped for child in children if "Worker" in child.name() for mapped in child.memory_maps()]
        shared = {Path(mapped.path) for mapped in maps if mapped.path.startswith("/dev/shm/")}
        of_the_cpu = {path for path in shared if "cpushm" in path.name}
        queues = {path for path in shared if path.name.startswith("psm_")}
        assert len(of_the_cpu) == 2
        assert not [path for path in of_the_cpu if path.exists()]
        assert len([path for path in queues if path.exists()]) <= 1 < len(queues)  # one is the engine's own

    def test_ten_steps_of_an_optimizer(self, engine: RolloutEngine, model: Path) -> None:
        take_ten_steps(engine, model)

    def test_weights_of_another_model_are_refused(self, engine: RolloutEngine, model: Path) -> None:
        weights = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
        half = {name: tensor for name, tensor in weights.items() if "k_proj" not in name}
        with pytest.raises(EngineError, match="lacks weights of 2 layers"):
            engine.update_weights([WeightBucket(tuple(half.items()))], 201)
        engine.update_weights([WeightBucket(tuple(weights.items()))], 202)
        (made,) = engine.generate_batch([request(4)])
        assert made.versions == [(202, 4)]


def take_ten_steps(engine: RolloutEngine, model: Path) -> None:
    """New tokens have the trainer's log-probs after every step of an optimizer, and had others before the update."""
    trainer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=0.01)
    tokens = torch.randint(5, 250, (4, 24), generator=torch.Generator().manual_seed(0))
    requests = [request(12, prompt=[20 + index] * (index + 1), seed=index) for index in range(4)]
    for step in range(1, 11):
        trainer(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 10:
            (stale,) = engine.generate_batch(requests[:1])
            assert largest_difference(trainer, requests[0], stale) > 1e-2, "a skipped update would not be seen"
        engine.update_weights(tiny_buckets(trainer), 100 + step)
        for asked, made in zip(requests, engine.generate_batch(requests), strict=True):
            assert made.versions == [(100 + step, 12)]
            assert largest_difference(trainer, asked, made) < 1e-4


def request(max_tokens: int, *, prompt: Sequence[int] = (10, 60, 110), seed: int = 0) -> GenerationRequest:
    return GenerationRequest(prompt, SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True))


def tiny_buckets(model: Any) -> Iterator[WeightBucket]:
    """Buckets of one tensor each, which divide fused layers, in memory that is overwritten afterwards."""
    for name, parameter in model.named_parameters():
        sent = parameter.detach().clone()
        yield WeightBucket(((name, sent),))
        sent.fill_(float("nan"))


@torch.no_grad()
def largest_difference(model: Any, asked: GenerationRequest, made: Completion) -> float:
    """Largest difference of the completion's log-probs to those of ``model``."""
    logits = model(input_ids=torch.tensor([[*asked.prompt, *made.tokens]])).logits[0, len(asked.prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(made.tokens)[:, None])[:, 0]
    return float((expected - torch.tensor(made.logprobs)).abs().max())


def sharp_model(path: Path, seed: int) -> Path:
    return tiny_model(path, seed=seed, initializer_range=0.15, max_position_embeddings=MAX_MODEL_LEN, **HEADS)


del VLLMConformance, RolloutEngineConformance
