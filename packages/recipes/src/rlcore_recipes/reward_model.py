"""Scores of a reward model, added to those of the reward."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rlcore.batch import Batch
from rlcore.batch.alignment import last_entries
from rlcore.engines import ForwardRequest

if TYPE_CHECKING:
    from rlcore_recipes.session import Session

logger = logging.getLogger(__name__)


def model_values(session: Session[Any], batch: Batch) -> Batch:
    """The reward model's ``values``, read at every token; under Ray they are computed meanwhile."""
    engine = session.roles.reward_model
    assert engine is not None
    with session.timed.label("reward_model"):
        return engine.forward(batch.select("tokens"), ForwardRequest(("values",)))


def with_model_scores(session: Session[Any], batch: Batch, values: Batch) -> Batch:
    """Add ``reward_model_score`` (dense fp32), the value at each sequence's last token, and add it to ``score``.

    A sample for which the sum is not finite gets ``reward.error_score``, and its result the error "reward_model".
    """
    settings, engine = session.config.reward_model, session.roles.reward_model
    assert engine is not None
    with session.timed("reward_model"):
        scores = session.executor.compute(last_values, values.select("values"))
        if settings.offload:
            engine.offload()
    total = batch["score"] + settings.coeff * scores
    failed = ~torch.isfinite(total)
    if failed.any():
        batch = with_failures(session, batch, failed)
        total = torch.where(failed, session.config.reward.error_score, total)
        scores = torch.where(failed, 0.0, scores)
    return batch.with_columns(score=total, reward_model_score=scores)


def with_failures(session: Session[Any], batch: Batch, failed: torch.Tensor) -> Batch:
    """``batch`` with the error "reward_model" in the results of the samples that ``failed``, ``[B]`` bool."""
    samples = failed.nonzero().flatten().tolist()
    groups = sorted({int(batch["group"][sample]) for sample in samples})
    logger.warning(
        "the reward model's score of %d of %d samples is not finite; they get reward.error_score=%g (prompts %s%s)",
        len(samples),
        len(batch),
        session.config.reward.error_score,
        ", ".join(map(str, groups[:10])),
        " …" if len(groups) > 10 else "",
    )
    marked = session.executor.compute(mark_failed, batch.select("reward_result"), frozenset(samples))
    return batch.with_columns(reward_result=marked["reward_result"])


def mark_failed(batch: Batch, failed: frozenset[int]) -> Batch:
    """``reward_result`` with the error "reward_model" where the sample's number is among ``failed``."""
    results = batch["reward_result"]
    return Batch(
        {
            "reward_result": [
                replace(result, error=result.error or "reward_model") if number in failed else result
                for number, result in enumerate(results)
            ]
        }
    )


def last_values(batch: Batch) -> torch.Tensor:
    """``values`` at the last token of each sequence: ``[B]`` fp32."""
    return last_entries(batch.flat("values"), batch.lengths)
