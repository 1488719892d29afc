"""The samples of a step, and their scores."""

from __future__ import annotations

from typing import Any

from rlcore.batch import Batch
from rlcore_recipes.rollouts.source import Rollouts
from rlcore_recipes.run.session import Session


def rollouts(session: Session[Any], number: int) -> Rollouts:
    """Return the samples that step ``number`` trains on: ``rollout.n`` trajectories of each prompt.

    In synchronous training they are generated now; with dynamic sampling, dropped groups are replaced until the batch
    is full. In asynchronous training they were generated while earlier steps trained. The scores may still be computed
    when this returns: `add_scores` waits for them.
    """
    return session.groups.take(number)


def add_scores(session: Session[Any], batch: Batch, samples: Rollouts) -> Batch:
    """Add the scores of ``samples``, whose rows are those of ``batch``; wait for those that are still computed.

    Adds ``score`` (dense fp32), ``reward_result`` and ``completion`` (objects), as the run needs them
    ``reward_model_score`` (dense fp32) and ``baseline_score`` (dense fp32: the score of a greedy completion of the same
    prompt).
    """
    scores = samples.scores.result()
    return batch.with_columns(**{name: scores[name] for name in scores.names})
