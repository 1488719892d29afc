"""Packed, padded and plain transformers agree, in four architectures: log-probs, gradients, one optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngineSpec
from rlcore_fsdp import attention
from rlcore_fsdp.engine import FSDPTrainEngine, build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import (
    TrainEngineConformance,
    WeightedLogprobs,
    make_batch,
    make_branching,
    reference_outputs,
)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": False},
    "Llama": {"attention_bias": True, "tie_word_embeddings": False},
    "Mistral": {"sliding_window": 6, "head_dim": 8},
    # A window on the second layer only.
    "Qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}
BATCH = make_batch()
BATCHES = [pytest.param(BATCH, id="different"), pytest.param(make_branching(), id="branching")]
# Plain gradient descent in disguise (see AdamW with ε = 1), so that a step is as exact as its gradient.
OPTIM = OptimSettings(lr=1.0, eps=1.0, clip_grad=None)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    return tiny_model(tmp_path_factory.mktemp(name), architecture=name.split("-")[0], **ARCHITECTURES[name])


def make_engine(path: Path, **overrides: Any) -> FSDPTrainEngine:
    options = overrides.pop("options", {})
    settings: dict[str, Any] = {"optim": OPTIM, "max_tokens": 1000, **overrides}
    return build(TrainEngineSpec(ModelSettings(path=str(path)), FSDPSettings(device="cpu", **options), **settings))


def padded_outputs(model: Any, batch: Batch) -> list[torch.Tensor]:
    """Log-probs per sequence from one right-padded batch with a mask."""
    tokens = batch["tokens"]
    padded = tokens.to_padded(0)
    mask = (torch.arange(padded.shape[1])[None] < tokens.lengths[:, None]).long()
    logits = model(padded, attention_mask=mask, use_cache=False).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, padded[:, 1:, None]).squeeze(-1)
    return [torch.cat([row.new_zeros(1), row[: length - 1]]) for row, length in zip(logprobs, tokens.lengths.tolist())]


@pytest.mark.parametrize("batch", BATCHES)
def test_packed_padded_and_one_by_one_agree(path: Path, batch: Batch) -> None:
    """In fp32 results differ by 2e-6, because sums are rounded in another order."""
    model, batch = TrainEngineConformance.reference(path), batch.select("tokens")
    packed = [row["logprobs"] for row in make_engine(path).forward(batch, ForwardRequest()).rows()]
    padded = padded_outputs(model, batch)
    for row, ours, theirs in zip(batch.rows(), packed, padded):
        alone, _ = reference_outputs(model, row["tokens"])
        torch.testing.assert_close(ours, alone, atol=2e-6, rtol=0)
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_and_a_step_agree(path: Path, batch: Batch) -> None:
    model, engine = TrainEngineConformance.reference(path), make_engine(path)
    seen: dict[str, torch.Tensor] = {}
    for name, parameter in engine.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    engine.train(batch, WeightedLogprobs())
    loss = torch.zeros(())
    for row in batch.rows():
        logprobs, entropy = reference_outputs(model, row["tokens"])
        loss -= ((logprobs * row["weights"] + 0.05 * entropy) * row["loss_mask"]).sum()
    (loss / batch.flat("loss_mask").sum()).backward()
    torch.optim.AdamW(model.parameters(), lr=1.0, eps=1.0, weight_decay=0.0, foreach=False).step()
    trained = dict(engine.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, atol=5e-7, rtol=1e-4, msg=name)
        torch.testing.assert_close(trained[name], parameter, atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"logits_chunk": 3}], ids=str)
def test_options_that_save_memory_change_no_result(path: Path, options: dict[str, Any]) -> None:
    """Recomputation is the same arithmetic; chunks change the order of a sum over tokens."""
    weights = []
    for chosen in ({}, options):
        engine = make_engine(path, options=chosen)
        engine.train(BATCH, WeightedLogprobs())
        weights.append(dict(engine.model.named_parameters()))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=0, msg=name)


def test_the_sliding_window_changes_results() -> None:
    """With shorter sequences the tests above would pass without a window."""
    assert max(BATCH.lengths.tolist()) > 3 * 6


def test_gradient_checkpointing_recomputes_layers(tmp_path: Path) -> None:
    path = tiny_model(tmp_path)
    calls = {}
    for on in (False, True):
        engine = make_engine(path, options={"gradient_checkpointing": on})
        counted: list[int] = []
        engine.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        engine.forward(BATCH, ForwardRequest())
        assert len(counted) == 1
        engine.train(BATCH, WeightedLogprobs())
        calls[on] = len(counted) - 1
        assert not any(module.training for module in engine.root.modules())
    assert calls == {False: 1, True: 2}


def test_a_band_covers_the_last_tokens() -> None:
    band = attention._mask(5, 5, 2, torch.device("cpu"))
    assert band is not None
    assert band.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    rest = attention._mask(2, 5, 3, torch.device("cpu"))
    assert rest is not None
    assert rest.int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_dropout_of_the_model_is_off(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, attention_dropout=0.5)
    norms = {make_engine(path).train(BATCH, WeightedLogprobs()).to_dict()["grad_norm"] for _ in range(2)}
    calm = make_engine(tiny_model(tmp_path / "calm")).train(BATCH, WeightedLogprobs()).to_dict()["grad_norm"]
    assert norms == {calm}


def test_sequences_without_tokens_may_be_between_others(tmp_path: Path) -> None:
    engine = make_engine(tiny_model(tmp_path))
    rows = [row["tokens"] for row in BATCH.rows()]
    with_gaps = Batch({"tokens": Jagged.from_list([rows[0][:0], rows[0], rows[0][:0], rows[1]], torch.int64)})
    out = engine.forward(with_gaps, ForwardRequest())
    assert out.lengths.tolist() == [0, 5, 0, 30]
    without = engine.forward(with_gaps.take([1, 3]), ForwardRequest())
    assert torch.equal(out.flat("logprobs"), without.flat("logprobs"))
