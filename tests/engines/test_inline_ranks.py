"""The inline rollout over an FSDP engine: sharded over two real processes, each with its own requests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rlcore.engines import (
    ForwardRequest,
    GenerationRequest,
    ModelSettings,
    OptimSettings,
    RolloutSpec,
    SamplingParams,
    TrainEngineSpec,
    sync_weights,
)
from rlcore.errors import EngineError
from rlcore_fsdp import engine as fsdp
from rlcore_fsdp.settings import FSDPSettings
from rlcore_inline.engine import InlineRollout, build
from rlcore_inline.settings import InlineSettings
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import WeightedLogprobs, make_batch

SHARES = (3, 14)  # requests of each rank


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.15)


def make(path: Path, decoder: str) -> tuple[fsdp.FSDPTrainEngine, InlineRollout]:
    model = ModelSettings(path=str(path))
    settings = FSDPSettings(device="cpu")
    actor = fsdp.build(TrainEngineSpec(model, settings, optim=OptimSettings(lr=0.5, eps=1.0), max_tokens=64))
    return actor, build(RolloutSpec(model, InlineSettings(decoder=decoder), 128, train_engine=actor))


def requests(rank: int) -> list[GenerationRequest]:
    return [
        GenerationRequest([9 + rank, 7, 30 + i], SamplingParams(max_tokens=5 + 6 * rank + i, seed=i, ignore_eos=True))
        for i in range(SHARES[rank])
    ]


def generate_train_generate(path: Path, decoder: str) -> dict[str, Any]:
    """On every rank: a batch, single requests between `wake` and `sleep`, a training step, a batch."""
    actor, rollout = make(path, decoder)
    before = rollout.generate_batch(requests(rollout.dp_rank))
    nothing = rollout.generate_batch(requests(1) if rollout.dp_rank == 1 else [])

    async def singly() -> list[Any]:
        few = requests(rollout.dp_rank)[: 2 + 3 * rollout.dp_rank]
        return [await rollout.generate(request) for request in few]  # idle in between

    rollout.wake()
    single = asyncio.run(singly())
    rollout.sleep()
    batch = make_batch(seed=rollout.dp_rank)
    actor.train(batch, WeightedLogprobs())
    sync_weights(actor, rollout, 7)
    after = rollout.generate_batch(requests(rollout.dp_rank))
    weights = {name: tensor.clone() for bucket in actor.export_weights() for name, tensor in bucket.tensors}
    return {
        "rank": (rollout.dp_rank, rollout.dp_size),
        "before": before,
        "nothing": len(nothing),
        "single": single,
        "after": after,
        "weights": weights,
    }


def train_while_held(path: Path) -> str:
    actor, rollout = make(path, "auto")
    rollout.wake()
    actor.step_count += 1
    try:
        rollout.generate_batch([])
    except EngineError as error:
        return str(error)
    finally:
        dist.barrier()
        rollout.sleep()
    return ""


@pytest.mark.parametrize("decoder", ["direct", "generic"])
def test_each_rank_generates_its_share_with_whole_weights(ranks: RankPool, model_path: Path, decoder: str) -> None:
    results = ranks.run(generate_train_generate, model_path, decoder)
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    _, alone = make(model_path, decoder)
    for rank, result in enumerate(results):
        assert result["rank"] == (rank, 2)
        assert result["nothing"] == (SHARES[1] if rank == 1 else 0)
        check(reference, requests(rank), result["before"], version=0)
        assert [c.tokens for c in result["before"]] == [c.tokens for c in alone.generate_batch(requests(rank))]
        assert [c.tokens for c in result["single"]] == [c.tokens for c in result["before"]][: len(result["single"])]
    trained = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    trained.load_state_dict(results[0]["weights"], strict=False)
    for rank, result in enumerate(results):
        check(trained, requests(rank), result["after"], version=7)
        assert [c.tokens for c in result["after"]] != [c.tokens for c in result["before"]]


def test_training_while_weights_are_held_is_an_error(ranks: RankPool, model_path: Path) -> None:
    for message in ranks.run(train_while_held, model_path):
        assert "before training" in message


def test_logprobs_equal_the_training_engines_own(model_path: Path) -> None:
    from rlcore.batch import Batch, Jagged

    actor, rollout = make(model_path, "auto")
    sent = requests(1)
    completions = rollout.generate_batch(sent)
    tokens = Jagged.from_list([[*r.prompt, *c.tokens] for r, c in zip(sent, completions)])
    mask = Jagged.from_list([[0] * len(r.prompt) + [1] * len(c.tokens) for r, c in zip(sent, completions)])
    own = actor.forward(Batch({"tokens": tokens, "loss_mask": mask}), ForwardRequest())["logprobs"].to_list()
    for request, completion, logprobs in zip(sent, completions, own):
        assert completion.logprobs == pytest.approx(logprobs[len(request.prompt) :].tolist(), abs=1e-5)


def check(reference: Any, sent: list[GenerationRequest], completions: list[Any], version: int) -> None:
    for request, completion in zip(sent, completions, strict=True):
        assert len(completion.tokens) == request.sampling.max_tokens
        assert completion.versions == [(version, len(completion.tokens))]
        with torch.no_grad():
            whole = torch.tensor([[*request.prompt, *completion.tokens]])
            logits = reference(input_ids=whole).logits[0, len(request.prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
