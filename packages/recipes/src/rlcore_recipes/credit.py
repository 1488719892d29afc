"""From scores to advantages."""

from __future__ import annotations

from rlcore.algorithms.kl import KLController, apply_kl_penalty
from rlcore.algorithms.shaping import overlong_punishment, terminal_rewards
from rlcore.batch import Batch
from rlcore.metrics import Metrics
from rlcore_recipes.settings import AlgorithmSettings


def with_advantages(
    batch: Batch, algorithm: AlgorithmSettings, kl: KLController | None, max_response_length: int
) -> tuple[Batch, Metrics]:
    """Add the per-token ``token_rewards``, ``advantages`` and, for a critic, ``returns``.

    The score stands on the last token of each completion; shaping and the KL penalty come before the estimator.

    Args:
        kl: holds the coefficient of the KL penalty, and adapts it; None without a penalty.
    """
    scores, metrics = batch["score"], Metrics()
    if algorithm.overlong is not None:
        punishment = overlong_punishment(batch["response_length"], max_response_length, algorithm.overlong)
        scores = scores + punishment
        metrics.mean("reward/overlong_punishment", float(punishment.mean()))
    batch = batch.with_columns(token_rewards=batch.jagged(terminal_rewards(batch, scores)))
    if algorithm.kl_in_reward is not None and kl is not None:
        batch, measured = apply_kl_penalty(batch, algorithm.kl_in_reward.estimator, kl)
        metrics.update(measured.prefixed("actor/"))
    found = algorithm.advantage(batch)
    batch = batch.with_columns(advantages=batch.jagged(found.advantages))
    if found.returns is not None:
        batch = batch.with_columns(returns=batch.jagged(found.returns))
    return batch, metrics
