"""Four real processes give the results of one, in every layout that fits.

Tolerances: fp32 sums are taken in another order. The optimizer is AdamW with ε = 1, whose first steps are nearly plain
gradient descent, so that weights can be compared as closely as gradients.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlcore.batch import Batch
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngine, TrainEngineSpec
from rlcore.engines.settings import Head
from rlcore.errors import CheckpointError, EngineError
from rlcore_kit.checkpoint.rank_files import file_record
from rlcore_kit.testing.layout_equality import check_equal, spread, train_and_forward
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import WeightedLogprobs, exported, make_batch
from rlcore_megatron.engine import build
from rlcore_megatron.settings import MegatronSettings

ATOL = 3e-6
OPTIM = OptimSettings(lr=0.5, eps=1.0, clip_grad=1.0, weight_decay=0.01)
REQUEST = ForwardRequest(("logprobs", "entropy"), temperature=0.9)
BATCHES = [make_batch((50, 3, 3, 2, 31, 4), seed=1), make_batch((9, 9, 40), seed=2)]


def make_engine(path: Path, options: dict[str, Any], **overrides: Any) -> TrainEngine:
    settings: dict[str, Any] = {"optim": OPTIM, "max_tokens": 40, **overrides}
    return build(TrainEngineSpec(ModelSettings(path=str(path)), MegatronSettings(device="cpu", **options), **settings))


def run(path: Path, options: dict[str, Any], batches: list[Batch], head: Head = "policy") -> dict[str, Any]:
    engine = make_engine(path, options, head=head)
    result = train_and_forward(engine, batches, head)
    engine.close()
    return result


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a vocabulary of 261 does not divide by two
    return tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def alone(model_path: Path) -> dict[str, Any]:
    return run(model_path, {}, BATCHES)


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "dp4-plain-optimizer": {"distributed_optimizer": False},
    "dp4-overlapped": {"ddp": {"overlap_grad_reduce": True, "bucket_size": 1000}},
    "tp2": {"tensor_parallel": 2},
    "tp2-sp": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel": 2},
    "pp4": {"pipeline_parallel": 4},
    "pp2-interleaved": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "cp2": {"context_parallel": 2},
    "tp2-pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "tp2-sp-pp2-interleaved": {
        "tensor_parallel": 2,
        "sequence_parallel": True,
        "pipeline_parallel": 2,
        "virtual_pipeline": 2,
    },
    "tp2-sp-cp2": {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2},
    "cp2-pp2": {"context_parallel": 2, "pipeline_parallel": 2},
    "cp4": {"context_parallel": 4},
    "tp2-recomputed": {"tensor_parallel": 2, "sequence_parallel": True, "recompute": "full"},
    "pp2-selective": {"pipeline_parallel": 2, "recompute": "selective"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_equals_one_process(ranks: RankPool, model_path: Path, alone: dict[str, Any], name: str) -> None:
    for result in ranks.run(run, model_path, LAYOUTS[name], BATCHES, timeout=300):
        check_equal(result, alone, ATOL)


@pytest.mark.parametrize(
    ("architecture", "overrides", "layout"),
    [
        ("Qwen3", {"head_dim": 16}, {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2}),
        ("Llama", {"tie_word_embeddings": False}, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    ],
)
def test_gradient_norms_of_untied_embeddings_equal_one_process(
    ranks: RankPool, tmp_path: Path, architecture: str, overrides: dict[str, Any], layout: dict[str, Any]
) -> None:
    path = tiny_model(tmp_path, architecture=architecture, **overrides)
    check_equal(ranks.run(run, path, layout, BATCHES, timeout=300)[3], run(path, {}, BATCHES), ATOL)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


@pytest.fixture(scope="module")
def experts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    return tiny_model(path, architecture="Qwen3Moe", tie_word_embeddings=False, head_dim=8, **EXPERTS)


@pytest.fixture(scope="module")
def experts_alone(experts_path: Path) -> dict[str, Any]:
    return run(experts_path, {}, BATCHES)


@pytest.mark.parametrize(
    "layout",
    [
        {"expert_parallel": 4},
        {"expert_parallel": 2},
        {"expert_parallel": 2, "distributed_optimizer": False},
        {"expert_parallel": 2, "pipeline_parallel": 2},
        {"expert_parallel": 2, "context_parallel": 2},
        {"expert_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
        {"expert_parallel": 4, "expert_tensor_parallel": 1, "tensor_parallel": 2, "sequence_parallel": True},
    ],
    ids=str,
)
def test_experts_equal_one_process(
    ranks: RankPool, experts_path: Path, experts_alone: dict[str, Any], layout: dict[str, Any]
) -> None:
    for result in ranks.run(run, experts_path, layout, BATCHES, timeout=300):
        check_equal(result, experts_alone, ATOL)


@pytest.mark.parametrize("head", ["value", "score"])
@pytest.mark.parametrize("layout", ["tp2-pp2", "tp2-sp-cp2"])
def test_scalar_heads_equal_one_process(
    ranks: RankPool, model_path: Path, tmp_path: Path, head: str, layout: str
) -> None:
    path = model_path if head == "value" else tiny_model(tmp_path, head="score", num_hidden_layers=4)
    # Values reach some tens, and so do the gradients.
    for result in ranks.run(run, path, LAYOUTS[layout], BATCHES, head, timeout=300):
        check_equal(result, run(path, {}, BATCHES, head), 10 * ATOL)


@pytest.mark.parametrize("layout", ["dp4", "tp2", "pp2-interleaved"])
def test_a_replica_without_samples_takes_part(ranks: RankPool, model_path: Path, layout: str) -> None:
    batches = [make_batch((30,), seed=3)]
    check_equal(
        ranks.run(run, model_path, LAYOUTS[layout], batches, timeout=300)[3], run(model_path, {}, batches), ATOL
    )


@pytest.mark.parametrize("options", [{}, {"distributed_optimizer": False}], ids=["divided", "undivided"])
def test_mixed_precision_updates_fp32_weights(
    ranks: RankPool, model_path: Path, alone: dict[str, Any], options: dict[str, Any]
) -> None:
    """bf16 forward and backward: 8 bits of mantissa, so about a percent; layouts differ less than that."""
    options = {"dtype": "bfloat16", **options}
    one = run(model_path, options, BATCHES)
    four = ranks.run(run, model_path, {**options, "tensor_parallel": 2}, BATCHES, timeout=300)[0]
    for name, tensor in alone["weights"].items():
        assert one["weights"][name].dtype == torch.bfloat16
        torch.testing.assert_close(four["weights"][name].float(), tensor, atol=2e-2, rtol=2e-2, msg=name)
        torch.testing.assert_close(four["weights"][name], one["weights"][name], atol=1e-2, rtol=1e-2, msg=name)
    assert one["metrics"][0]["grad_norm"] == pytest.approx(alone["metrics"][0]["grad_norm"], rel=2e-2)
    torch.testing.assert_close(one["logprobs"], alone["logprobs"], atol=0.1, rtol=0)
    torch.testing.assert_close(four["logprobs"], one["logprobs"], atol=0.05, rtol=0)


@dataclasses.dataclass
class FailsOnOneReplica(WeightedLogprobs):
    def loss(self, outputs: Any, batch: Batch, denominators: Any) -> Any:
        if dist.get_rank() == 3:
            raise RuntimeError("broken objective")
        return super().loss(outputs, batch, denominators)


def fail_and_go_on(path: Path, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    engine = make_engine(path, options)
    try:
        spread(engine, BATCHES[0], lambda part: engine.train(part, FailsOnOneReplica(0.9)))
        message = ""
    except Exception as error:
        message = str(error)
    after = spread(engine, BATCHES[0], lambda part: engine.train(part, WeightedLogprobs(0.9))).to_dict()
    engine.close()
    return message, after


@pytest.mark.parametrize("layout", ["dp4", "pp4", "pp2"])
def test_an_objective_that_fails_on_one_rank_fails_on_all(
    ranks: RankPool, model_path: Path, alone: dict[str, Any], layout: str
) -> None:
    for message, after in ranks.run(fail_and_go_on, model_path, LAYOUTS[layout], timeout=300):
        assert "objective" in message
        assert after == pytest.approx(alone["metrics"][0], rel=1e-4)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_after_a_step(path: Path, folder: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = make_engine(path, options)
    spread(engine, BATCHES[0], lambda part: engine.train(part, WeightedLogprobs()))
    engine.save(folder)
    spread(engine, BATCHES[1], lambda part: engine.train(part, WeightedLogprobs()))
    weights = exported(engine)
    engine.close()
    return weights


def continue_from(path: Path, folder: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = make_engine(path, options, seed=5)
    engine.load(folder)
    spread(engine, BATCHES[1], lambda part: engine.train(part, WeightedLogprobs()))
    weights = exported(engine)
    engine.close()
    return weights


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("tp2-pp2", ("pp2-interleaved", "dp4-plain-optimizer", "alone")),
        ("dp4", ("tp2-sp-cp2",)),
        ("pp2-interleaved", ("tp2-pp2",)),
        ("dp4-plain-optimizer", ("tp2",)),
    ],
)
def test_another_layout_loads_a_checkpoint(
    ranks: RankPool, model_path: Path, tmp_path: Path, saved: str, loaded: tuple[str, ...]
) -> None:
    expected = ranks.run(save_after_a_step, model_path, tmp_path, LAYOUTS[saved], timeout=300)[0]
    same = ranks.run(continue_from, model_path, tmp_path, LAYOUTS[saved], timeout=300)[3]
    assert all(torch.equal(same[name], expected[name]) for name in expected), "the same layout: bit for bit"
    for layout in loaded:
        if layout == "alone":
            again = continue_from(model_path, tmp_path, {})
        else:
            again = ranks.run(continue_from, model_path, tmp_path, LAYOUTS[layout], timeout=300)[0]
        for name, tensor in expected.items():
            torch.testing.assert_close(again[name], tensor, atol=ATOL, rtol=0, msg=f"{layout}: {name}")


@pytest.mark.parametrize("files", ["safetensors", "torch_dist"])
def test_another_layout_loads_a_checkpoint_of_experts_and_bf16(
    ranks: RankPool, experts_path: Path, tmp_path: Path, files: str
) -> None:
    layout = {"expert_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True, "checkpoint_format": files}
    expected = ranks.run(save_after_a_step, experts_path, tmp_path / "fp32", layout, timeout=300)[0]
    for name, tensor in continue_from(experts_path, tmp_path / "fp32", {}).items():
        torch.testing.assert_close(tensor, expected[name], atol=ATOL, rtol=0, msg=name)
    half = {"dtype": "bfloat16", "expert_parallel": 2, "checkpoint_format": files}
    expected = ranks.run(save_after_a_step, experts_path, tmp_path / "bf16", half, timeout=300)[0]
    same = ranks.run(continue_from, experts_path, tmp_path / "bf16", half, timeout=300)[0]
    assert all(torch.equal(same[name], expected[name]) for name in expected)


def go_on(engine: TrainEngine) -> dict[str, Any]:
    """What an engine does next, and the random numbers that it would draw."""
    result: dict[str, Any] = {"drawn": torch.rand(3)}
    out = spread(engine, BATCHES[0], lambda part: engine.forward(part, REQUEST))
    result |= {name: out.flat(name) for name in out.names}
    steps = [spread(engine, batch, lambda part: engine.train(part, WeightedLogprobs())) for batch in BATCHES]
    return result | {"metrics": [step.to_dict() for step in steps], "weights": exported(engine)}


def save_and_go_on(path: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Everything after ``start_save`` happens before ``finish_save``."""
    engine = make_engine(path, {**options, "checkpoint_format": "torch_dist"})
    spread(engine, BATCHES[1], lambda part: engine.train(part, WeightedLogprobs()))
    saved = exported(engine)
    engine.start_save(folder)
    result = go_on(engine)
    files = engine.finish_save()
    engine.close()
    return result | {"files": files, "saved": saved}


def load_and_go_on(path: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    engine = make_engine(path, options, seed=5)
    engine.load(folder)
    result = go_on(engine)
    engine.close()
    return result


def load_with_megatron(path: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    engine: Any = make_engine(path, options, optim=None)
    (module,) = engine.modules
    module.load_state_dict(dist_checkpointing.load(module.sharded_state_dict(), str(folder)), strict=False)
    weights = exported(engine)
    engine.close()
    return {"weights": weights, "names": set(dist_checkpointing.load_tensors_metadata(str(folder)))}


def test_another_layout_loads_files_of_megatron(ranks: RankPool, model_path: Path, tmp_path: Path) -> None:
    results = ranks.run(save_and_go_on, model_path, tmp_path, LAYOUTS["tp2"], timeout=300)
    files = {name: record for result in results for name, record in result["files"].items()}
    assert files == {file.name: file_record(file) for file in tmp_path.iterdir()}, "on some rank's list, once"
    assert {"checkpoint.json", "metadata.json", ".metadata", "common.pt", "__3_0.distcp"} <= files.keys()
    expected = results[0]
    for result, same in zip(results, ranks.run(load_and_go_on, model_path, tmp_path, LAYOUTS["tp2"], timeout=300)):
        assert torch.equal(same["drawn"], result["drawn"])
        assert same["metrics"] == expected["metrics"]
        assert torch.equal(same["logprobs"], expected["logprobs"])
        assert all(torch.equal(same["weights"][name], tensor) for name, tensor in expected["weights"].items())
    for layout in ("pp2", "dp4-plain-optimizer"):
        other = ranks.run(load_and_go_on, model_path, tmp_path, LAYOUTS[layout], timeout=300)[0]
        torch.testing.assert_close(other["logprobs"], expected["logprobs"], atol=0, rtol=1e-6)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(other["weights"][name], tensor, atol=ATOL, rtol=0, msg=f"{layout}: {name}")
    read = ranks.run(load_with_megatron, model_path, tmp_path, LAYOUTS["pp2"], timeout=300)[0]
    assert all(torch.equal(read["weights"][name], tensor) for name, tensor in expected["saved"].items())
    weights = {name for name in read["names"] if not name.startswith("optimizer.")}
    assert "decoder.layers.self_attention.linear_qkv.weight" in weights
    states = {f"optimizer.state.{state}.{name}" for state in ("param", "exp_avg", "exp_avg_sq") for name in weights}
    assert read["names"] == weights | states


def test_megatron_reads_checkpoints_of_experts(ranks: RankPool, experts_path: Path, tmp_path: Path) -> None:
    saved = {"expert_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True, "dtype": "bfloat16"}
    expected = ranks.run(save_and_go_on, experts_path, tmp_path, saved, timeout=300)[0]["saved"]
    other = {"expert_parallel": 4, "dtype": "bfloat16"}
    read = ranks.run(load_with_megatron, experts_path, tmp_path, other, timeout=300)[0]["weights"]
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


class Intruder:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.write_text, (self.target, "executed")


def test_damaged_megatron_files_are_refused(model_path: Path, tmp_path: Path) -> None:
    engine = make_engine(model_path, {"checkpoint_format": "torch_dist"})
    good, folder, before = tmp_path / "good", tmp_path / "bad", exported(engine)
    engine.save(good)
    spread(engine, BATCHES[0], lambda part: engine.train(part, WeightedLogprobs()))
    after = exported(engine)

    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words):
            engine.load(folder)
        assert all(torch.equal(tensor, after[name]) for name, tensor in exported(engine).items())
        shutil.rmtree(folder)
        shutil.copytree(good, folder)

    shutil.copytree(good, folder)
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(content)
    refused("__0_0.distcp is damaged: it does not match its checksum")
    (folder / "__0_1.distcp").unlink()
    refused("__0_1.distcp is missing or damaged")
    (folder / "checkpoint.json").unlink()  # what remains is what Megatron itself would have written
    refused("holds no complete checkpoint: checkpoint.json is missing")
    manifest = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**manifest, "files_format": "zarr"}))
    refused("files_format: Input should be 'safetensors' or 'torch_dist'")
    # a file with foreign code, and the checksum that fits it
    torch.save(Intruder(tmp_path / "proof"), folder / "__0_0.distcp")
    record = file_record(folder / "__0_0.distcp")
    for where, _, _ in manifest["ranks"][0]:
        if where[0] == "__0_0.distcp":
            where[1:3] = 0, record["size"]
    manifest["files"]["__0_0.distcp"] = record
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    refused("__0_0.distcp is missing or damaged: UnpicklingError")
    assert not (tmp_path / "proof").exists()

    (tmp_path / "file").write_text("mine")
    for save in (engine.save, engine.start_save):
        with pytest.raises(CheckpointError, match=f"cannot write {tmp_path / 'file'}"):
            save(tmp_path / "file")
    (folder / "__0_1.distcp").unlink()
    (folder / "__0_1.distcp").mkdir()  # where a file should be
    engine.start_save(folder)
    with pytest.raises(CheckpointError, match=r"rank 0: cannot write .*__0_1\.distcp"):
        engine.finish_save()
    refused("no complete checkpoint")
    engine.load(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in exported(engine).items())
    engine.close()


# --- layouts that do not fit ------------------------------------------------------------------------------------------


def refuse(path: Path, options: dict[str, Any]) -> str:
    try:
        make_engine(path, options)
    except EngineError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tensor_parallel": 8}, "8 does not divide the number of processes 4"),
        ({"tensor_parallel": 4}, "tensor_parallel 4 is more than the 2 key-value heads"),
        ({"pipeline_parallel": 2, "virtual_pipeline": 4}, "4 layers are not divisible by pipeline_parallel 2"),
        ({"expert_parallel": 2}, "the model has no experts"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused(
    ranks: RankPool, model_path: Path, options: dict[str, Any], reason: str
) -> None:
    assert all(reason in message for message in ranks.run(refuse, model_path, options, timeout=300))


def hold_two_layouts(path: Path) -> str:
    engine = make_engine(path, {"tensor_parallel": 2})
    message = refuse(path, {"pipeline_parallel": 2})
    engine.close()
    return message


def test_engines_of_one_process_have_the_same_layout(ranks: RankPool, model_path: Path) -> None:
    for message in ranks.run(hold_two_layouts, model_path, timeout=300):
        assert "all megatron engines of a process must have the same layout" in message
