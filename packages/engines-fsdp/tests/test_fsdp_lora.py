"""LoRA: results equal those of PEFT, on one rank and on two; only adapters are trained and saved; export merges them.

Tolerances: PEFT's own model differs by the order of fp32 sums. The optimizer is AdamW with ε = 1, which is nearly plain
gradient descent, so that a step is as exact as its gradient.
"""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from rlcore.batch import Batch
from rlcore.engines import ExportSpec, ForwardRequest, LoRASettings, ModelSettings, OptimSettings, TrainEngineSpec
from rlcore.errors import CheckpointError, EngineError
from rlcore_fsdp.engine import FSDPTrainEngine, build
from rlcore_fsdp.export import export
from rlcore_fsdp.settings import FSDPSettings
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

TASKS = {"value": "TOKEN_CLS", "score": "SEQ_CLS"}
LORA = LoRASettings(rank=3, alpha=6)
ATOL = 1e-5
START_S = 300  # importing PEFT and transformers on a busy machine takes its time
BATCHES = [make_batch((50, 3, 3, 2, 31, 4), seed=1), make_batch((9, 9, 40), seed=2)]


def make_engine(
    path: Path, lora: LoRASettings | None = LORA, head: Any = "policy", new_head: bool = False, **options: Any
) -> FSDPTrainEngine:
    optim = OptimSettings(lr=0.5, eps=1.0, clip_grad=1.0)
    settings = FSDPSettings(device="cpu", lora=lora, **options)
    model = ModelSettings(path=str(path))
    return build(TrainEngineSpec(model, settings, head, optim, max_tokens=40, new_head=new_head))


def train(engine: FSDPTrainEngine, batch: Batch) -> dict[str, float]:
    """Make one step with this rank's part of ``batch``."""
    objective = WeightedLogprobs() if engine.spec.head == "policy" else SquaredError()
    metrics = engine.train(batch.take(batch.partition(engine.dp_size)[engine.dp_rank]), objective)
    return {name: metrics.to_dict()[name] for name in ("grad_norm", "lr", "skipped_steps")}


def logprobs(engine: FSDPTrainEngine, batch: Batch) -> torch.Tensor:
    """Compute log-probs of all of ``batch`` on every rank."""
    return engine.forward(batch.select("tokens"), ForwardRequest()).flat("logprobs")


def adapters(engine: FSDPTrainEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in engine.export_adapters() for name, tensor in bucket.tensors}


def run(path: Path, options: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Make two steps, with a checkpoint after the first; full results on every rank."""
    engine = make_engine(path, **options)
    metrics = [train(engine, BATCHES[0])]
    if folder is not None:
        engine.save(folder)
    metrics.append(train(engine, BATCHES[1]))
    weights = exported(engine) if engine.spec.head == "policy" else {}
    return {"metrics": metrics, "adapters": adapters(engine), "weights": weights}


def resume(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    engine = make_engine(path)
    engine.load(folder)
    train(engine, BATCHES[1])
    return adapters(engine)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 261 rows of embeddings and 63 of the MLP do not divide by two, nor does the rank of the adapters.
    return tiny_model(tmp_path_factory.mktemp("model"), intermediate_size=63)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "one"


@pytest.fixture(scope="module")
def alone(model_path: Path, checkpoint: Path) -> dict[str, Any]:
    return run(model_path, {}, checkpoint)


@torch.no_grad()
def fill_up_matrices(engine: FSDPTrainEngine) -> None:
    """Give adapters an effect: B starts at zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in engine.model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)


def test_a_step_equals_one_with_peft(model_path: Path, tmp_path: Path) -> None:
    """Compare log-probs, gradients and one optimizer step."""
    engine, batch = make_engine(model_path), BATCHES[0]
    fill_up_matrices(engine)
    engine.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "saved" / "adapter", is_trainable=True).eval()
    loss = torch.zeros(())
    ours = engine.forward(batch.select("tokens"), ForwardRequest()).rows()
    for row, mine in zip(batch.rows(), ours, strict=True):
        theirs, entropy = reference_outputs(model, row["tokens"])
        torch.testing.assert_close(mine["logprobs"], theirs, atol=ATOL, rtol=0)
        loss -= ((theirs * row["weights"] + 0.05 * entropy) * row["loss_mask"]).sum()
    (loss / batch.flat("loss_mask").sum()).backward()

    seen: dict[str, torch.Tensor] = {}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    metrics = train(engine, batch)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == {f"base_model.model.{name}" for name in seen}
    assert len(seen) == 2 * 2 * 7  # A and B of seven linear layers in two blocks
    for name, grad in seen.items():
        torch.testing.assert_close(grad, trained[f"base_model.model.{name}"].grad, atol=ATOL, rtol=0, msg=name)
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    torch.optim.AdamW(trained.values(), lr=0.5, eps=1.0, weight_decay=0.0, foreach=False).step()
    expected = dict(model.named_parameters())
    for name, parameter in engine.model.named_parameters():
        torch.testing.assert_close(parameter, expected[f"base_model.model.{name}"], atol=ATOL, rtol=0, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="sharded"),
        pytest.param({"offload_params": True}, id="offloaded"),
        pytest.param({"gradient_checkpointing": True, "reduce_every_micro_batch": True}, id="checkpointed"),
    ],
)
def test_two_ranks_equal_one(ranks: RankPool, model_path: Path, alone: dict[str, Any], options: dict[str, Any]) -> None:
    for result in ranks.run(run, model_path, options, timeout=START_S):
        for ours, theirs in zip(result["metrics"], alone["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        for kind in ("adapters", "weights"):
            assert result[kind].keys() == alone[kind].keys()
            for name, tensor in alone[kind].items():
                torch.testing.assert_close(result[kind][name], tensor, atol=ATOL, rtol=0, msg=name)


def test_frozen_weights_do_not_change(model_path: Path, alone: dict[str, Any]) -> None:
    """Full weights have the names and the order of a model without adapters."""
    before = exported(make_engine(model_path, lora=None))
    assert list(alone["weights"]) == list(before)
    for name, tensor in before.items():
        adapted = "_proj.weight" in name
        assert torch.equal(alone["weights"][name], tensor) is not adapted, name


def test_merged_weights_compute_the_same_as_adapters(model_path: Path, tmp_path: Path) -> None:
    engine = make_engine(model_path)
    fill_up_matrices(engine)
    engine.save_pretrained(tmp_path / "merged")
    plain = make_engine(tmp_path / "merged", lora=None)
    torch.testing.assert_close(logprobs(plain, BATCHES[0]), logprobs(engine, BATCHES[0]), atol=ATOL, rtol=0)
    weights, frozen = exported(engine), exported(make_engine(model_path, lora=None))
    found = adapters(engine)
    name = "model.layers.1.mlp.down_proj"
    up, down = (found[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
    torch.testing.assert_close(weights[f"{name}.weight"], frozen[f"{name}.weight"] + up @ down, atol=1e-6, rtol=0)
    engine.save_pretrained(tmp_path / "merged")  # over what stands there
    assert (tmp_path / "merged" / "adapter" / "adapter_model.safetensors").is_file()
    targets = json.loads((tmp_path / "merged" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets), "the file is the same in every run"
    assert len(targets) == 7
    plain.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter").exists(), "they do not belong to these weights"


class WithoutAdapters(WeightedLogprobs):
    """Requests outputs that have no gradient."""

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("logprobs", "entropy"), adapters=False)


def reference(path: Path, folder: Path | None, options: dict[str, Any]) -> None:
    """Compare the log-probs without adapters with those of a separate frozen engine, bit for bit, over training."""
    engine = make_engine(path, **options)
    frozen = build(replace(make_engine(path, lora=None, **options).spec, optim=None))
    request = ForwardRequest(("logprobs", "entropy"), temperature=0.7)

    def both() -> list[Batch]:
        without = engine.forward(BATCHES[1], replace(request, adapters=False))
        return [without, frozen.forward(BATCHES[1], request), engine.forward(BATCHES[1], request)]

    without, separate, policy = both()
    assert torch.equal(policy.flat("logprobs"), without.flat("logprobs")), "adapters have no effect at first"
    if folder is not None:
        engine.load(folder)
    for _ in range(3):
        train(engine, BATCHES[0])
        engine.offload()
        without, separate, policy = both()
        for name in request.outputs:
            assert torch.equal(without.flat(name), separate.flat(name)), name
        assert not torch.allclose(policy.flat("logprobs"), separate.flat("logprobs"), atol=1e-3)
    assert all(p.requires_grad is (".lora_" in name) for name, p in engine.model.named_parameters())


@pytest.mark.parametrize("options", [{}, {"param_dtype": "bfloat16"}], ids=["fp32", "bf16"])
def test_without_adapters_the_policy_is_its_reference(
    ranks: RankPool, model_path: Path, alone: dict[str, Any], checkpoint: Path, options: dict[str, Any]
) -> None:
    """On one rank and on two, after optimizer steps, offloading and a resume."""
    reference(model_path, None if options else checkpoint, options)
    ranks.run(reference, model_path, None if options else checkpoint, options, timeout=START_S)


def test_adapters_cannot_be_left_out_where_they_are_needed(model_path: Path) -> None:
    without = ForwardRequest(adapters=False)
    with pytest.raises(EngineError, match=r"needs an engine that trains adapters; this one trains all weights"):
        make_engine(model_path, lora=None).forward(BATCHES[0], without)
    with pytest.raises(EngineError, match="nothing would train"):
        make_engine(model_path).train(BATCHES[0], WithoutAdapters())


def test_resumed_training_gives_the_same_bits(
    ranks: RankPool, model_path: Path, alone: dict[str, Any], checkpoint: Path
) -> None:
    shapes = json.loads((checkpoint / "checkpoint.json").read_text())["shapes"]
    assert all(".lora_" in name for name in shapes)
    resumed = resume(model_path, checkpoint)
    for name, tensor in alone["adapters"].items():
        assert torch.equal(resumed[name], tensor), name
    for result in ranks.run(resume, model_path, checkpoint, timeout=START_S):
        for name, tensor in alone["adapters"].items():
            torch.testing.assert_close(result[name], tensor, atol=ATOL, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("lora", "other_weights", "message"),
    [
        (None, False, "trains adapters of rank 3 and alpha 6; this one trains all weights"),
        (LoRASettings(rank=2, alpha=8), False, "rank 3 and alpha 6; this one trains adapters of rank 2 and alpha 8"),
        (LORA, True, "holds adapters of another base model than model.path"),
    ],
    ids=["all weights", "another rank", "another model"],
)
def test_checkpoints_of_other_adapters_or_weights_are_refused(
    model_path: Path,
    alone: dict[str, Any],
    checkpoint: Path,
    tmp_path: Path,
    lora: LoRASettings | None,
    other_weights: bool,
    message: str,
) -> None:
    path = tiny_model(tmp_path, intermediate_size=63, seed=1) if other_weights else model_path
    with pytest.raises(CheckpointError, match=message):
        make_engine(path, lora=lora).load(checkpoint)


class TestCheckpoints(CheckpointTests):
    """The conformance kit's, with adapters."""

    def make_engine(self, spec: TrainEngineSpec) -> FSDPTrainEngine:
        return build(replace(spec, options=FSDPSettings(device="cpu", lora=LORA)))


def test_a_critic_trains_its_head_too(ranks: RankPool, model_path: Path, tmp_path: Path) -> None:
    engine = make_engine(model_path, head="value")
    before = exported(engine)
    train(engine, BATCHES[0])
    after = exported(engine)
    assert not torch.equal(before["score.weight"], after["score.weight"])
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    engine.save_pretrained(tmp_path)
    plain = AutoModelForTokenClassification.from_pretrained(model_path, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    tokens = BATCHES[0].select("tokens").take([0])
    ours = engine.forward(tokens, ForwardRequest(("values",))).flat("values")[1:]
    with torch.no_grad():
        theirs = model(input_ids=tokens.flat("tokens")[None]).logits[0, :-1, 0]
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=1e-5)
    train(engine, BATCHES[1])
    for result in ranks.run(run, model_path, {"head": "value"}, timeout=START_S):
        for name, tensor in adapters(engine).items():
            torch.testing.assert_close(result["adapters"][name], tensor, atol=ATOL, rtol=0, msg=name)


def values(engine: FSDPTrainEngine) -> torch.Tensor:
    return engine.forward(BATCHES[0].select("tokens"), ForwardRequest(("values",))).flat("values")


@pytest.mark.parametrize("head", ["value", "score"])
@pytest.mark.filterwarnings("ignore:the scalar head is new")
def test_a_new_head_is_saved_loaded_and_exported(model_path: Path, tmp_path: Path, head: Any) -> None:
    """A model without its trained head would score at random."""
    new = {"head": head, "new_head": True}
    engine = make_engine(model_path, **new)
    train(engine, BATCHES[0])
    trained = values(engine)
    engine.save(tmp_path / "checkpoint")
    engine.save_pretrained(tmp_path / "model")
    again = make_engine(model_path, **new)
    assert not torch.equal(values(again), trained)
    again.load(tmp_path / "checkpoint")
    assert torch.equal(values(again), trained)
    merged = build(replace(make_engine(tmp_path / "model", lora=None, head=head).spec, optim=None))
    torch.testing.assert_close(values(merged), trained, atol=ATOL, rtol=1e-5)

    export(ExportSpec(replace(engine.spec, optim=None), tmp_path / "checkpoint", tmp_path / "adapter", adapter=True))
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", tmp_path / "model/adapter")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert "base_model.model.score.weight" in ours
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["score"], TASKS[head])
    classes = {"value": AutoModelForTokenClassification, "score": AutoModelForSequenceClassification}
    plain = classes[head].from_pretrained(model_path, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    tokens = BATCHES[0].take([0]).flat("tokens")
    model.config.pad_token_id = None
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits.flatten()
    expected = logits[:-1] if head == "value" else logits
    found = trained[: len(tokens)][1:] if head == "value" else trained[len(tokens) - 1 : len(tokens)]
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:the scalar head is new")
def test_a_missing_head_is_an_error(model_path: Path, tmp_path: Path) -> None:
    engine = make_engine(model_path, head="score", new_head=True)
    engine.save(tmp_path / "checkpoint")
    manifest = json.loads((tmp_path / "checkpoint" / "checkpoint.json").read_text())
    del manifest["shapes"]["weight/score.weight"]
    for rank in manifest["ranks"]:
        del rank["weight/score.weight"]
    (tmp_path / "checkpoint" / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        engine.load(tmp_path / "checkpoint")
    engine.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "score" not in name}, file)
    with pytest.raises(EngineError, match=r"have no scalar head \(score\.weight\)"):
        build(replace(engine.spec, model=ModelSettings(path=str(tmp_path / "model")), optim=None, new_head=False))


def test_adapters_keep_master_precision(model_path: Path) -> None:
    """Frozen weights have the precision of the forward pass, which needs no more."""
    engine = make_engine(model_path, param_dtype="bfloat16")
    for name, parameter in engine.model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
    train(engine, BATCHES[0])
    assert {tensor.dtype for tensor in [*adapters(engine).values(), *exported(engine).values()]} == {torch.bfloat16}


def test_dropout_is_for_training_only(model_path: Path) -> None:
    """Layers that are recomputed in backward drop the same elements."""
    norms = []
    for options in ({"dropout": 0.0}, {"dropout": 0.5}, {"dropout": 0.5, "gradient_checkpointing": True}):
        lora = LoRASettings(rank=4, alpha=8, dropout=options.pop("dropout"))
        engine = make_engine(model_path, lora, **options)
        fill_up_matrices(engine)
        before = logprobs(engine, BATCHES[0])
        assert torch.equal(before, logprobs(engine, BATCHES[0]))
        torch.manual_seed(5)
        norms.append(train(engine, BATCHES[0])["grad_norm"])
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)
    assert norms[1] == pytest.approx(norms[2], rel=1e-5)


def test_an_error_names_experts_that_are_no_layers(tmp_path: Path) -> None:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    options = {**experts, "moe_intermediate_size": 16, "head_dim": 8, "first_k_dense_replace": 1}
    path = tiny_model(tmp_path, architecture="Glm4Moe", **options)
    with pytest.raises(EngineError, match=r"layers\.1\.mlp\.experts of Glm4MoeForCausalLM is no linear layer"):
        make_engine(path)


def test_wrong_settings_are_reported(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"target_modules names lm_head, wait, but .* are down_proj, gate_proj, "):
        make_engine(model_path, LoRASettings(target_modules=("q_proj", "wait", "lm_head")))
    with pytest.raises(EngineError, match="trains no adapters"):
        list(make_engine(model_path, lora=None).export_adapters())
    real = builtins.__import__

    def without_peft(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(EngineError, match=r"needs PEFT, which is not installed: pip install 'rlcore\[lora\]'"):
        make_engine(model_path)


def test_only_selected_layers_are_adapted(model_path: Path) -> None:
    found = adapters(make_engine(model_path, LoRASettings(rank=3, target_modules=("q_proj", "v_proj"))))
    assert {name.split(".")[-3] for name in found} == {"q_proj", "v_proj"}
    assert {min(tensor.shape) for tensor in found.values()} == {3}
