"""Scores of a reward model, added to those of the reward."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from rlcore.batch import Batch
from rlcore.batch.alignment import last_entries
from rlcore.controller import Executor
from rlcore.engines import ForwardRequest, TrainEngine
from rlcore_recipes.run.timing import Timings
from rlcore_recipes.settings import RewardModelSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardModel:
    """A frozen model that scores whole sequences, of any number of groups together.

    Attributes:
        error_score: score of a sample for which the sum of both scores is not finite.
    """

    engine: TrainEngine
    settings: RewardModelSettings
    error_score: float
    executor: Executor
    timed: Timings

    def values(self, batch: Batch) -> Batch:
        """Return the model's ``values`` at every token; with Ray they are computed in the background."""
        with self.timed.label("reward_model"):
            return self.engine.forward(batch.select("tokens"), ForwardRequest(("values",)))

    def added(self, scores: Batch, values: Batch, group: torch.Tensor) -> Batch:
        """Return ``scores`` with ``reward_model_score`` (dense fp32), the value at each sequence's last token, added.

        A sample for which the sum is not finite gets ``error_score``, and its result the error "reward_model".

        Args:
            scores: the columns of `Scorer.score`.
            group: ``[B]`` int64: position of each sample's prompt.
        """
        with self.timed("reward_model"):
            found = self.executor.compute(last_values, values.select("values"))
            if self.settings.offload:
                self.engine.offload()
        total = scores["score"] + self.settings.coeff * found
        failed = ~torch.isfinite(total)
        if failed.any():
            scores = self._with_failures(scores, failed, group)
            total = torch.where(failed, self.error_score, total)
            found = torch.where(failed, 0.0, found)
        return scores.with_columns(score=total, reward_model_score=found)

    def _with_failures(self, scores: Batch, failed: torch.Tensor, group: torch.Tensor) -> Batch:
        """Return ``scores`` with the error "reward_model" in the results of samples that ``failed``, ``[B]`` bool."""
        samples = failed.nonzero().flatten().tolist()
        prompts = sorted({int(group[sample]) for sample in samples})
        logger.warning(
            "the reward model's score of %d of %d samples is not finite; they get reward.error_score=%g (prompts %s%s)",
            len(samples),
            len(scores),
            self.error_score,
            ", ".join(map(str, prompts[:10])),
            " …" if len(prompts) > 10 else "",
        )
        marked = self.executor.compute(mark_failed, scores.select("reward_result"), frozenset(samples))
        return scores.with_columns(reward_result=marked["reward_result"])


def mark_failed(batch: Batch, failed: frozenset[int]) -> Batch:
    """Return ``reward_result`` with the error "reward_model" for the samples whose indices are in ``failed``."""
    results = batch["reward_result"]
    return Batch(
        {
            "reward_result": [
                replace(result, error=result.error or "reward_model") if index in failed else result
                for index, result in enumerate(results)
            ]
        }
    )


def last_values(batch: Batch) -> torch.Tensor:
    """Return ``values`` at the last token of each sequence: ``[B]`` fp32."""
    return last_entries(batch.flat("values"), batch.lengths)
