"""Four real processes, divided in every way that fits, give what one gives.

Tolerances: fp32 sums are taken in another order. The optimizer is AdamW with ε = 1, whose first steps are nearly plain
gradient descent, so that weights can be compared as closely as gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlcore.batch import Batch
from rlcore.controller.dispatch import gather
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngine, TrainEngineSpec
from rlcore.testing.processes import RankPool
from rlcore.testing.tiny_model import tiny_model
from rlcore.testing.train_engine import SquaredError, WeightedLogprobs, exported, make_batch
from rlcore_megatron.config import MegatronSettings
from rlcore_megatron.engine import build

ATOL = 3e-6
OPTIM = OptimSettings(lr=0.5, eps=1.0, clip_grad=1.0, weight_decay=0.01)
REQUEST = ForwardRequest(("logprobs", "entropy"), temperature=0.9)
BATCHES = [make_batch((50, 3, 3, 2, 31, 4), seed=1), make_batch((9, 9, 40), seed=2)]


def make_engine(path: Path, options: dict[str, Any], **overrides: Any) -> TrainEngine:
    settings: dict[str, Any] = {"optim": OPTIM, "max_tokens": 40, **overrides}
    return build(TrainEngineSpec(ModelSettings(path=str(path)), MegatronSettings(device="cpu", **options), **settings))


def run(path: Path, options: dict[str, Any], batches: list[Batch], head: str = "policy") -> dict[str, Any]:
    """Train one step per batch, then forward over the first; whole results on every rank."""
    engine = make_engine(path, options, head=head)
    objective = WeightedLogprobs(0.9) if head == "policy" else SquaredError()
    request = REQUEST if head == "policy" else ForwardRequest(("values",))
    metrics = [spread(engine, batch, lambda part: engine.train(part, objective)).to_dict() for batch in batches]
    out = spread(engine, batches[0], lambda part: engine.forward(part, request))
    result = {"metrics": metrics, "weights": exported(engine)}
    engine.close()
    return result | {name: out.flat(name) for name in out.names}


def spread(engine: TrainEngine, batch: Batch, call: Any) -> Any:
    """As an executor does: every data-parallel rank gets its part, all ranks of a replica the same."""
    parts = batch.partition(engine.dp_size)
    mine = call(batch.take(parts[engine.dp_rank]))
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, (engine.dp_rank, mine))
    by_rank = dict(reversed(results))
    return gather([by_rank[rank] for rank in range(engine.dp_size)], parts)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a vocabulary of 261 does not divide by two
    return tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def alone(model_path: Path) -> dict[str, Any]:
    return run(model_path, {}, BATCHES)


def check_equal(result: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    for ours, theirs in zip(result["metrics"], expected["metrics"]):
        assert ours == pytest.approx(theirs, rel=max(1e-4, atol))
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], tensor, atol=atol, rtol=0, msg=name)
    for name in set(expected) - {"metrics", "weights"}:
        torch.testing.assert_close(result[name], expected[name], atol=5 * atol, rtol=0, msg=name)


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
def test_any_layout_equals_one_process(
    ranks: RankPool, model_path: Path, alone: dict[str, Any], name: str
) -> None:
    for result in ranks.run(run, model_path, LAYOUTS[name], BATCHES, timeout=120):
        check_equal(result, alone, ATOL)
