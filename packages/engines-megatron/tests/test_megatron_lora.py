"""LoRA: training equals that of the FSDP engine's PEFT adapters, in every layout; only adapters are trained and saved.

Tolerances: fp32 sums are taken in another order. The optimizer is AdamW with ε = 1, which is nearly plain gradient
descent, so that a step is as exact as its gradient.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from rlcore.batch import Batch
from rlcore.engines import ExportSpec, ForwardRequest, LoRASettings, ModelSettings, OptimSettings, TrainEngineSpec
from rlcore.errors import CheckpointError, EngineError
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import (
    CheckpointTests,
    SquaredError,
    WeightedLogprobs,
    exported,
    make_batch,
    reference_outputs,
)
from rlcore_megatron.engine import MegatronEngine, build
from rlcore_megatron.export import export
from rlcore_megatron.settings import MegatronSettings

LORA = LoRASettings(rank=3, alpha=6)
ATOL = 1e-5
BATCHES = [make_batch((50, 3, 3, 2, 31, 4), seed=1), make_batch((9, 9, 40), seed=2)]


def make_engine(
    path: Path, lora: LoRASettings | None = LORA, head: Any = "policy", trained: bool = True, **options: Any
) -> MegatronEngine:
    optim = OptimSettings(lr=0.5, eps=1.0, clip_grad=1.0) if trained else None
    settings = MegatronSettings(device="cpu", lora=lora, **options)
    return build(TrainEngineSpec(ModelSettings(path=str(path)), settings, head, optim, max_tokens=40))


def train(engine: MegatronEngine, batch: Batch) -> dict[str, float]:
    """Make one step with this rank's part of ``batch``."""
    objective = WeightedLogprobs() if engine.spec.head == "policy" else SquaredError()
    metrics = engine.train(batch.take(batch.partition(engine.dp_size)[engine.dp_rank]), objective)
    return {name: metrics.to_dict()[name] for name in ("grad_norm", "lr", "skipped_steps")}


def adapters(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in engine.export_adapters() for name, tensor in bucket.tensors}


def run(path: Path, options: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Make two steps, with a checkpoint after the first; full results on every rank."""
    engine = make_engine(path, **options)
    metrics = [train(engine, BATCHES[0])]
    if folder is not None:
        engine.save(folder)
    metrics.append(train(engine, BATCHES[1]))
    tokens = BATCHES[0].select("tokens")
    reference = engine.forward(tokens, ForwardRequest(adapters=False)).flat("logprobs")
    result = {"metrics": metrics, "adapters": adapters(engine), "weights": exported(engine), "reference": reference}
    engine.close()
    return result


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a vocabulary of 261 does not divide by two
    return tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "one"


@pytest.fixture(scope="module")
def alone(model_path: Path, checkpoint: Path) -> dict[str, Any]:
    return run(model_path, {}, checkpoint)


def test_training_equals_that_with_peft(model_path: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    """The adapters before the first step are the engine's; two steps of PEFT's lead to the same ones."""
    engine = make_engine(model_path)
    engine.save_pretrained(tmp_path / "start")
    frozen = exported(make_engine(model_path, lora=None, trained=False))
    plain = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "start" / "adapter", is_trainable=True).eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 7  # A and B of seven linear layers in two blocks
    optimizer = torch.optim.AdamW(trained.values(), lr=0.5, eps=1.0, weight_decay=0.0, foreach=False)
    for batch, metrics in zip(BATCHES, alone["metrics"], strict=True):
        loss = torch.zeros(())
        for row in batch.rows():
            logprobs, entropy = reference_outputs(model, row["tokens"])
            loss -= ((logprobs * row["weights"] + 0.05 * entropy) * row["loss_mask"]).sum()
        optimizer.zero_grad()
        (loss / batch.flat("loss_mask").sum()).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        optimizer.step()
    assert alone["adapters"].keys() == {name.replace(".default.", ".") for name in trained}
    for name, parameter in trained.items():
        expected = parameter * 2 if ".lora_B." in name else parameter  # alpha / rank
        torch.testing.assert_close(alone["adapters"][name.replace(".default.", ".")], expected, atol=ATOL, rtol=0)
    merged = model.merge_and_unload().state_dict()
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(tensor, merged[name], atol=ATOL, rtol=0, msg=name)
        assert torch.equal(tensor, frozen[name]) is not ("_proj.weight" in name), name


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "tp2": {"tensor_parallel": 2},
    "tp2-sp-recomputed": {"tensor_parallel": 2, "sequence_parallel": True, "recompute": "full"},
    "tp2-pp2": {"tensor_parallel": 2, "pipeline_parallel": 2, "checkpoint_format": "torch_dist"},
    "pp2-cp2": {"pipeline_parallel": 2, "context_parallel": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_equals_one_process(
    ranks: RankPool, model_path: Path, alone: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """Also from a checkpoint of that layout, which one process continues."""
    for result in ranks.run(run, model_path, LAYOUTS[name], tmp_path / "saved", timeout=300):
        for ours, theirs in zip(result["metrics"], alone["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        torch.testing.assert_close(result["reference"], alone["reference"], atol=ATOL, rtol=0)
        for kind in ("adapters", "weights"):
            assert list(result[kind]) == list(alone[kind])
            for tensor, expected in zip(result[kind].values(), alone[kind].values(), strict=True):
                torch.testing.assert_close(tensor, expected, atol=ATOL, rtol=0)
    engine = make_engine(model_path)
    engine.load(tmp_path / "saved")
    train(engine, BATCHES[1])
    for found, tensor in adapters(engine).items():
        torch.testing.assert_close(tensor, alone["adapters"][found], atol=ATOL, rtol=0, msg=found)


def test_a_checkpoint_holds_adapters_alone(model_path: Path, alone: dict[str, Any], checkpoint: Path) -> None:
    """Resumed training gives the same bits; the reference is that of a separate frozen engine, to the last bit."""
    shapes = json.loads((checkpoint / "checkpoint.json").read_text())["shapes"]
    assert all(".adapters." in name for name in shapes)
    engine = make_engine(model_path)
    engine.load(checkpoint)
    train(engine, BATCHES[1])
    for name, tensor in adapters(engine).items():
        assert torch.equal(tensor, alone["adapters"][name]), name
    frozen = make_engine(model_path, lora=None, trained=False)
    separate = frozen.forward(BATCHES[0].select("tokens"), ForwardRequest()).flat("logprobs")
    assert torch.equal(alone["reference"], separate)


@pytest.mark.parametrize(
    ("lora", "seed", "message"),
    [
        (None, 0, "trains adapters of rank 3 and alpha 6; this one trains all weights"),
        (LoRASettings(rank=2, alpha=8), 0, "this one trains adapters of rank 2 and alpha 8"),
        (LORA, 1, "holds adapters of another base model than model.path"),
    ],
    ids=["all weights", "another rank", "another model"],
)
def test_checkpoints_of_other_adapters_or_weights_are_refused(
    alone: dict[str, Any], checkpoint: Path, tmp_path: Path, lora: LoRASettings | None, seed: int, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        make_engine(tiny_model(tmp_path, num_hidden_layers=2, seed=seed), lora=lora).load(checkpoint)


class TestCheckpoints(CheckpointTests):
    """The conformance kit's, with adapters."""

    def make_engine(self, spec: TrainEngineSpec) -> MegatronEngine:
        return build(replace(spec, options=MegatronSettings(device="cpu", lora=LORA)))


@pytest.mark.filterwarnings("ignore:the scalar head is new")
def test_a_critic_keeps_its_head(model_path: Path, tmp_path: Path) -> None:
    """PEFT's file and the merged model, written from the checkpoint, compute the engine's values."""
    engine = make_engine(model_path, head="value")
    train(engine, BATCHES[0])
    tokens = BATCHES[0].select("tokens").take([0])
    values = engine.forward(tokens, ForwardRequest(("values",))).flat("values")
    engine.save(tmp_path / "checkpoint")
    engine.save_pretrained(tmp_path / "model")
    for adapter, folder in ((True, tmp_path / "adapter"), (False, tmp_path / "merged")):
        export(ExportSpec(engine.spec, tmp_path / "checkpoint", folder, adapter=adapter))
    saved = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in saved.items())
    plain = AutoModelForTokenClassification.from_pretrained(model_path, num_labels=1, dtype=torch.float32)
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for model in (PeftModel.from_pretrained(plain, tmp_path / "adapter"), merged):
        with torch.no_grad():
            theirs = model.eval()(input_ids=tokens.flat("tokens")[None]).logits[0, :-1, 0]
        torch.testing.assert_close(values[1:], theirs, atol=ATOL, rtol=1e-5)


def test_only_selected_layers_are_adapted(model_path: Path) -> None:
    lora = LoRASettings(rank=3, target_modules=("k_proj", "up_proj"))
    engine = make_engine(model_path, lora)
    train(engine, BATCHES[0])
    found = adapters(engine)
    assert {name.split(".")[-3] for name in found} == {"k_proj", "up_proj"}
    assert all(tensor.any() for tensor in found.values())
    with pytest.raises(EngineError, match=r"target_modules names wait, but .* are down_proj, gate_proj, k_proj, "):
        make_engine(model_path, LoRASettings(target_modules=("q_proj", "wait")))


def test_experts_and_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    path = tiny_model(tmp_path, architecture="Qwen3Moe", **experts)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"the experts of this qwen3_moe model cannot have adapters; list the layers"):
        make_engine(path)
    with pytest.raises(ValueError, match="adapters have none; set it to 0"):
        MegatronSettings(lora=LoRASettings(dropout=0.1))
    with pytest.raises(ValueError, match="set implementation to local"):
        MegatronSettings(lora=LORA, implementation="transformer_engine")
