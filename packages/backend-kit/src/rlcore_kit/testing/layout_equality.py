"""Comparing a training engine on several ranks with the same engine in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from rlcore.batch import Batch
from rlcore.controller.dispatch import gather
from rlcore.engines import ForwardRequest, TrainEngine
from rlcore.engines.settings import Head
from rlcore_kit.testing.train_engine import SquaredError, WeightedLogprobs, exported
from rlcore_kit.training.process_group import number_of_ranks

T = TypeVar("T")


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
    """Train one step per batch, then compute the first batch; collective.

    Returns:
        on every rank the ``metrics`` of each step, the full ``weights``, and the columns that were computed.
    """
    objective: Any = WeightedLogprobs(0.9) if head == "policy" else SquaredError()
    request = ForwardRequest(("logprobs", "entropy") if head == "policy" else ("values",), temperature=0.9)
    metrics = [spread(engine, batch, lambda part: engine.train(part, objective)).to_dict() for batch in batches]
    out = spread(engine, batches[0], lambda part: engine.forward(part, request))
    return {"metrics": metrics, "weights": exported(engine)} | {name: out.flat(name) for name in out.names}


def check_equal(result: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    """Compare two results of `train_and_forward`; columns may differ by five times ``atol``, weights by ``atol``."""
    for ours, theirs in zip(result["metrics"], expected["metrics"]):
        assert ours == pytest.approx(theirs, rel=max(1e-4, atol))
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], tensor, atol=atol, rtol=0, msg=name)
    for name in set(expected) - {"metrics", "weights"}:
        torch.testing.assert_close(result[name], expected[name], atol=5 * atol, rtol=0, msg=name)
