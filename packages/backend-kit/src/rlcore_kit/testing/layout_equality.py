"""Comparing a training engine on several ranks with the same engine in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from rlcore.batch import Batch
from rlcore.controller.dispatch import gather
from rlcore.engines import Comparison, ForwardRequest, TrainEngine
from rlcore.engines.settings import Head
from rlcore.engines.train import Output
from rlcore_kit.testing.train_engine import SquaredError, SumOf, WeightedLogprobs, exported
from rlcore_kit.testing.train_engine.comparisons import reverse_terms
from rlcore_kit.training.process_group import number_of_ranks

T = TypeVar("T")

COMPARED: tuple[Output, ...] = ("top_ids", "top_logprobs", "states")
VOCABULARY = 250  # token ids of a comparison, fewer than tiny models have


def spread(engine: TrainEngine, batch: Batch, call: Callable[[Batch], T]) -> T:
    """Call ``call`` with this rank's part of ``batch`` and gather the results, as an executor does; collective.

    All ranks of a data-parallel replica get the same part.
    """
    parts = batch.partition(engine.dp_size)
    mine = call(batch.take(parts[engine.dp_rank]))
    if number_of_ranks() == 1:
        return mine
    results: list[Any] = [None] * number_of_ranks()
    dist.all_gather_object(results, (engine.dp_rank, mine))
    by_rank = dict(reversed(results))
    return gather([by_rank[rank] for rank in range(engine.dp_size)], parts)  # type: ignore[no-any-return]


def train_and_forward(engine: TrainEngine, batches: Sequence[Batch], head: Head = "policy") -> dict[str, Any]:
    """Train one step per batch, then compute the first batch; collective. A policy is then compared with another one.

    Returns:
        on every rank the ``metrics`` of each step, the full ``weights``, and the columns that were computed.
    """
    objective: Any = WeightedLogprobs(0.9) if head == "policy" else SquaredError()
    outputs: tuple[Output, ...] = ("logprobs", "entropy", *COMPARED) if head == "policy" else ("values",)
    request = ForwardRequest(outputs, temperature=0.9, top_k=5)
    metrics = [spread(engine, batch, lambda part: engine.train(part, objective)).to_dict() for batch in batches]
    out = spread(engine, batches[0], lambda part: engine.forward(part, request))
    if head == "policy":
        columns, diverged = _diverged(engine, batches[0].with_columns(states=out["states"]))
        out, metrics = out.union(columns), [*metrics, diverged]
    return {"metrics": metrics, "weights": exported(engine)} | {name: out.flat(name) for name in out.names}


def _diverged(engine: TrainEngine, batch: Batch) -> tuple[Batch, dict[str, float]]:
    """Compare the engine with itself at another temperature; return the divergence, and the metrics of a step on it."""
    engine.hold_output_layer("warm", dataclasses.replace(engine.output_layer(), scale=0.3))
    request = ForwardRequest(("divergence",), 0.9, comparison=Comparison(reverse_terms, "states", "warm", VOCABULARY))
    columns = spread(engine, batch, lambda part: engine.forward(part, request))
    return columns, spread(engine, batch, lambda part: engine.train(part, SumOf(request))).to_dict()


def check_equal(result: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    """Compare two results of `train_and_forward`; columns may differ by five times ``atol``, weights by ``atol``."""
    for ours, theirs in zip(result["metrics"], expected["metrics"]):
        assert ours == pytest.approx(theirs, rel=max(1e-4, atol), abs=atol)
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], tensor, atol=atol, rtol=0, msg=name)
    assert torch.equal(result.get("top_ids", torch.empty(0)), expected.get("top_ids", torch.empty(0)))
    for name in set(expected) - {"metrics", "weights"}:
        torch.testing.assert_close(result[name], expected[name], atol=5 * atol, rtol=0, msg=name)
