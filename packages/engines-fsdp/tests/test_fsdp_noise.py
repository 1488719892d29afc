"""NEFTune: noise on embeddings in training alone, the same however samples are divided."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rlcore.algorithms.objectives import SFTObjective, SFTObjectiveSettings
from rlcore.batch import Batch
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngineSpec
from rlcore.errors import EngineError
from rlcore_fsdp.engine import FSDPTrainEngine, build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import TrainEngineConformance, make_batch

ALPHA = 20.0
OBJECTIVE = SFTObjective(SFTObjectiveSettings(neftune_alpha=ALPHA))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def batch_of(offset: int = 0) -> Batch:
    batch = make_batch().select("tokens", "loss_mask")
    return batch.with_columns(noise_seed=torch.arange(len(batch)) + offset)


def engine_of(path: Path, max_tokens: int = 1000) -> FSDPTrainEngine:
    spec = TrainEngineSpec(
        ModelSettings(path=str(path)),
        FSDPSettings(device="cpu"),
        optim=OptimSettings(lr=1e-2),
        max_tokens=max_tokens,
    )
    return build(spec)


def train(path: str, max_tokens: int, offset: int = 0) -> tuple[float, float]:
    """Return the rank's share of the loss, and the gradient norm."""
    engine, batch = engine_of(Path(path), max_tokens), batch_of(offset)
    own = batch.take(range(engine.dp_rank, len(batch), engine.dp_size))
    metrics = engine.train(own, OBJECTIVE).to_dict()
    return metrics["loss"], metrics["grad_norm"]


def test_the_loss_is_that_of_noisy_embeddings(path: Path) -> None:
    model, batch = TrainEngineConformance.reference(path), batch_of()
    total, size = 0.0, model.config.hidden_size
    for row in batch.rows():
        tokens = row["tokens"]
        generator = torch.Generator().manual_seed(int(row["noise_seed"]))
        uniform = torch.rand(len(tokens), size, generator=generator) * 2 - 1
        noise = uniform * (ALPHA / math.sqrt(len(tokens) * size))
        logits = model(inputs_embeds=model.get_input_embeddings()(tokens)[None] + noise[None]).logits[0, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        total -= float((logprobs * row["loss_mask"][1:]).sum())
    loss, _ = train(str(path), 1000)
    assert loss == pytest.approx(total / float(batch.flat("loss_mask").sum()), rel=1e-5)


def test_noise_depends_on_the_seeds_alone(path: Path, ranks: RankPool) -> None:
    whole, others = train(str(path), 1000), train(str(path), 1000, offset=1)
    assert train(str(path), 30) == pytest.approx(whole, rel=1e-5), "micro-batches"
    assert others[0] != pytest.approx(whole[0], rel=1e-4), "other seeds"
    norms = [norm for _, norm in ranks.run(train, str(path), 1000)]
    assert norms == pytest.approx([whole[1]] * 2, rel=1e-4), "ranks"


def test_a_forward_pass_without_gradient_has_no_noise(path: Path) -> None:
    engine, batch = engine_of(path), batch_of()
    clean = engine.forward(batch, ForwardRequest())
    assert torch.equal(clean.flat("logprobs"), engine.forward(make_batch(), ForwardRequest()).flat("logprobs"))
    with pytest.raises(EngineError, match="embedding_noise is for training"):
        engine.forward(batch, ForwardRequest(embedding_noise=1.0))
