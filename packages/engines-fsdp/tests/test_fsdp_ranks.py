"""Two processes give the results of one: sharded, hybrid, offloaded, with uneven work; other ranks load checkpoints.

Tolerances: fp32 sums are taken in another order over two ranks. The optimizer of most tests is AdamW with ε = 1, whose
first steps are nearly plain gradient descent, so that weights can be compared as closely as gradients.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from rlcore.batch import Batch
from rlcore.controller.dispatch import partition_of_call
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngine, TrainEngineSpec
from rlcore.engines.settings import Head
from rlcore.errors import CheckpointError, EngineError
from rlcore_fsdp.engine import FSDPTrainEngine, build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.testing.layout_equality import check_equal, spread, train_and_forward
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import (
    PairMargin,
    WeightedLogprobs,
    exported,
    make_batch,
    make_branching,
    make_pairs,
)

ATOL = 3e-6
OPTIM = OptimSettings(lr=0.5, eps=1.0, clip_grad=1.0)
REQUEST = ForwardRequest(("logprobs", "entropy"), temperature=0.9)


def make_engine(path: Path, options: dict[str, Any], **overrides: Any) -> FSDPTrainEngine:
    settings: dict[str, Any] = {"optim": OPTIM, "max_tokens": 40, **overrides}
    return build(TrainEngineSpec(ModelSettings(path=str(path)), FSDPSettings(device="cpu", **options), **settings))


def run(path: Path, options: dict[str, Any], batches: list[Batch], head: Head = "policy") -> dict[str, Any]:
    return train_and_forward(make_engine(path, options, head=head), batches, head)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 261 rows of embeddings and 63 of the MLP do not divide by two.
    return tiny_model(tmp_path_factory.mktemp("model"), intermediate_size=63)


BATCHES = [make_batch((50, 3, 3, 2, 31, 4), seed=1), make_batch((9, 9, 40), seed=2), make_branching(3)]


@pytest.fixture(scope="module")
def alone(model_path: Path) -> dict[str, Any]:
    return run(model_path, {}, BATCHES)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="sharded"),
        pytest.param({"replicate": 2}, id="hybrid"),
        pytest.param({"offload_params": True}, id="offloaded"),
        pytest.param({"reshard_after_forward": False, "reduce_every_micro_batch": True}, id="eager-reduction"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointed"),
    ],
)
def test_two_ranks_equal_one(ranks: RankPool, model_path: Path, alone: dict[str, Any], options: dict[str, Any]) -> None:
    results = ranks.run(run, model_path, options, BATCHES)
    for result in results:
        check_equal(result, alone, ATOL)


def test_two_ranks_equal_one_with_an_untied_head_and_a_sliding_window(ranks: RankPool, tmp_path: Path) -> None:
    path = tiny_model(tmp_path, architecture="Mistral", tie_word_embeddings=False, sliding_window=8, head_dim=8)
    check_equal(ranks.run(run, path, {}, BATCHES)[0], run(path, {}, BATCHES), ATOL)


@pytest.mark.parametrize("head", ["value", "score"])
def test_two_ranks_equal_one_with_scalar_heads(ranks: RankPool, model_path: Path, tmp_path: Path, head: str) -> None:
    path = model_path if head == "value" else tiny_model(tmp_path, head="score", intermediate_size=63)
    # Values reach some tens, and so do the gradients.
    check_equal(ranks.run(run, path, {}, BATCHES, head)[1], run(path, {}, BATCHES, head), 10 * ATOL)


def test_a_rank_without_samples_takes_part(ranks: RankPool, model_path: Path) -> None:
    batches = [make_batch((30,), seed=3)]
    check_equal(ranks.run(run, model_path, {}, batches)[1], run(model_path, {}, batches), ATOL)


def train_pairs(path: Path) -> dict[str, Any]:
    """Call `TrainEngine.train` as an executor does, whose dispatch divides the batch."""
    engine, batch, objective = make_engine(path, {}), make_pairs(), PairMargin()
    parts = partition_of_call(TrainEngine, "train", (batch, objective), {}, batch, engine.dp_size)
    engine.train(batch.take(parts[engine.dp_rank]), objective)
    return exported(engine)


def test_pairs_are_on_one_rank(ranks: RankPool, model_path: Path) -> None:
    expected = train_pairs(model_path)
    for name, tensor in ranks.run(train_pairs, model_path)[0].items():
        torch.testing.assert_close(tensor, expected[name], atol=ATOL, rtol=0, msg=name)


def test_mixed_precision_updates_fp32_weights(ranks: RankPool, model_path: Path, alone: dict[str, Any]) -> None:
    """bf16 forward and backward: 8 bits of mantissa, so about a percent; one rank and two differ less than that."""
    options = {"param_dtype": "bfloat16"}
    one, two = run(model_path, options, BATCHES), ranks.run(run, model_path, options, BATCHES)[0]
    for name, tensor in alone["weights"].items():
        assert one["weights"][name].dtype == torch.bfloat16
        torch.testing.assert_close(two["weights"][name].float(), tensor, atol=2e-2, rtol=2e-2, msg=name)
        torch.testing.assert_close(two["weights"][name], one["weights"][name], atol=1e-2, rtol=1e-2, msg=name)
    assert one["metrics"][0]["grad_norm"] == pytest.approx(alone["metrics"][0]["grad_norm"], rel=2e-2)
    assert not torch.equal(one["logprobs"], alone["logprobs"])
    torch.testing.assert_close(one["logprobs"], alone["logprobs"], atol=0.1, rtol=0)
    torch.testing.assert_close(two["logprobs"], one["logprobs"], atol=0.05, rtol=0)


def test_an_architecture_is_verified_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    path = tiny_model(tmp_path, architecture="Phi3")
    check_equal(ranks.run(run, path, {}, BATCHES)[1], run(path, {}, BATCHES), ATOL)


def count_layer_calls(path: Path) -> int:
    engine = make_engine(path, {"gradient_checkpointing": True}, max_tokens=1000)
    calls: list[int] = []
    engine.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    engine.train(make_batch(), WeightedLogprobs())
    return len(calls)


def test_shards_recompute_their_activations(ranks: RankPool, model_path: Path) -> None:
    assert ranks.run(count_layer_calls, model_path) == [2, 2]


def gather_for_generation(path: Path) -> dict[str, Any]:
    engine = make_engine(path, {})
    sharded = {name: type(p) is not torch.nn.Parameter or isinstance(p, DTensor) for name, p in named(engine)}
    with engine.generation_weights() as model:
        assert not model.training
        full = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert not any(isinstance(p, DTensor) for p in model.parameters())
    again = {name: isinstance(p, DTensor) for name, p in named(engine)}
    trained = engine.train(make_batch(seed=engine.dp_rank), WeightedLogprobs()).to_dict()
    return {"before": sharded, "full": full, "after": again, "norm": trained["grad_norm"], "steps": engine.step_count}


def named(engine: FSDPTrainEngine) -> list[tuple[str, torch.nn.Parameter]]:
    return list(engine.model.named_parameters())


def test_generation_weights_are_full_while_they_are_lent(ranks: RankPool, model_path: Path) -> None:
    engine = make_engine(model_path, {})
    for result in ranks.run(gather_for_generation, model_path):
        assert all(result["before"].values())
        assert all(result["after"].values())
        assert result["steps"] == 1
        for name, parameter in named(engine):
            assert torch.equal(result["full"][name], parameter), name


def use_while_generating(path: Path, folder: Path) -> dict[str, Any]:
    """Use the engine in every way while its full weights are lent, and return these afterwards."""
    engine = make_engine(path, {})
    engine.train(make_batch(seed=engine.dp_rank), WeightedLogprobs())
    expected = exported(engine)
    uses: dict[str, Any] = {
        "forward": lambda: engine.forward(make_batch(seed=engine.dp_rank), REQUEST),
        "save": lambda: engine.save(folder / "checkpoint"),
        "export": lambda: exported(engine),
        "save_pretrained": lambda: engine.save_pretrained(folder / "model"),
    }
    intact = {}
    with engine.generation_weights() as model:
        held = dict(model.named_parameters())
        for use, call in uses.items():
            call()
            stored = all(weight.untyped_storage().nbytes() for weight in held.values())
            intact[use] = stored and all(torch.equal(held[name], expected[name]) for name in held)
    return {"intact": intact, "sharded": [isinstance(p, DTensor) for _, p in named(engine)]}


def test_weights_in_use_for_generation_stay_full(ranks: RankPool, model_path: Path, tmp_path: Path) -> None:
    for result in ranks.run(use_while_generating, model_path, tmp_path):
        assert result["intact"] == dict.fromkeys(("forward", "save", "export", "save_pretrained"), True)
        assert all(result["sharded"])
    manifest = json.loads((tmp_path / "checkpoint" / "checkpoint.json").read_text())
    moments = [name for name in manifest["shapes"] if name.startswith("exp_avg/")]
    assert len(moments) == len(manifest["adam_steps"]) > 0


def save_after_a_step(path: Path, folder: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = make_engine(path, options)
    spread(engine, BATCHES[0], lambda part: engine.train(part, WeightedLogprobs()))
    engine.save(folder)
    spread(engine, BATCHES[1], lambda part: engine.train(part, WeightedLogprobs()))
    return exported(engine)


def continue_from(path: Path, folder: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = make_engine(path, options, seed=5)
    engine.load(folder)
    spread(engine, BATCHES[1], lambda part: engine.train(part, WeightedLogprobs()))
    return exported(engine)


@pytest.mark.parametrize("options", [{}, {"replicate": 2}], ids=["sharded", "hybrid"])
def test_a_checkpoint_of_two_ranks_continues(
    ranks: RankPool, model_path: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    expected = ranks.run(save_after_a_step, model_path, tmp_path / "two", options)[0]
    same = ranks.run(continue_from, model_path, tmp_path / "two", options)[0]
    assert all(torch.equal(same[name], expected[name]) for name in expected), "the same ranks: bit for bit"
    resharded = continue_from(model_path, tmp_path / "two", {})
    for name, tensor in expected.items():
        torch.testing.assert_close(resharded[name], tensor, atol=ATOL, rtol=0, msg=name)


def test_a_checkpoint_of_one_rank_continues_on_two(ranks: RankPool, model_path: Path, tmp_path: Path) -> None:
    expected = save_after_a_step(model_path, tmp_path / "one", {})
    for result in ranks.run(continue_from, model_path, tmp_path / "one", {}):
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, atol=ATOL, rtol=0, msg=name)


def load_damaged(path: Path, folder: Path) -> tuple[str, bool]:
    engine = make_engine(path, {})
    before = exported(engine)
    try:
        engine.load(folder)
    except CheckpointError as error:
        after = exported(engine)
        return str(error), all(torch.equal(before[name], after[name]) for name in before)
    return "", False


def test_damage_that_one_rank_sees_stops_both(ranks: RankPool, model_path: Path, tmp_path: Path) -> None:
    ranks.run(save_after_a_step, model_path, tmp_path / "two", {})
    (tmp_path / "two" / "rank-00001.safetensors").unlink()
    for message, unchanged in ranks.run(load_damaged, model_path, tmp_path / "two"):
        assert "rank-00001.safetensors" in message
        assert unchanged


def write_pretrained(path: Path, out: Path) -> dict[str, torch.Tensor]:
    engine = make_engine(path, {})
    spread(engine, BATCHES[0], lambda part: engine.train(part, WeightedLogprobs()))
    engine.save_pretrained(out)
    return exported(engine)


def test_two_ranks_write_a_model_folder(ranks: RankPool, model_path: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = ranks.run(write_pretrained, model_path, tmp_path / "out")[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def refuse(path: Path, options: dict[str, Any]) -> str:
    try:
        make_engine(path, options)
    except EngineError as error:
        return str(error)
    return ""


def test_replicas_must_divide_the_ranks(ranks: RankPool, model_path: Path, tmp_path: Path) -> None:
    for message in ranks.run(refuse, model_path, {"replicate": 3}):
        assert "replicate 3 does not divide the number of processes 2" in message


def test_a_missing_model_fails_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    for message in ranks.run(refuse, tmp_path / "nowhere", {}, timeout=30):
        assert "does not exist" in message
    incomplete = tiny_model(tmp_path / "incomplete")
    config = json.loads((incomplete / "config.json").read_text())
    (incomplete / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    for message in ranks.run(refuse, incomplete, {}, timeout=30):  # only the first rank reads weights
        assert "lack 12 tensors" in message
