"""From scores to advantages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlcore.algorithms.kl import KLController, apply_kl_penalty
from rlcore.algorithms.shaping import overlong_punishment, terminal_rewards
from rlcore.batch import Batch
from rlcore.metrics import Metrics
from rlcore_recipes.settings import AlgorithmSettings

if TYPE_CHECKING:
    from rlcore_recipes.session import Session


def with_advantages(session: Session[Any], batch: Batch) -> tuple[Batch, Metrics]:
    """Add the columns of `advantages`; the KL penalty's coefficient, if there is one, adapts to the batch."""
    config = session.config
    found, metrics, kl = session.executor.compute(
        advantages, batch.drop(*batch.object_names), config.algorithm, session.kl, config.data.max_response_length
    )
    if session.kl is not None:
        session.kl.load_state_dict(kl)
    return batch.with_columns(**{name: found[name] for name in found.names}), metrics


def advantages(
    batch: Batch, algorithm: AlgorithmSettings, kl: KLController | None, max_response_length: int
) -> tuple[Batch, Metrics, dict[str, Any]]:
    """The per-token columns ``token_rewards``, ``advantages`` and, for a critic, ``returns``; metrics; the state of
    ``kl`` afterwards.

    The score stands on the last token of each completion; shaping and the KL penalty come before the estimator.

    Args:
        batch: all columns but objects.
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
    columns = {"token_rewards": batch["token_rewards"], "advantages": batch.jagged(found.advantages)}
    if found.returns is not None:
        columns["returns"] = batch.jagged(found.returns)
    return Batch(columns), metrics, {} if kl is None else kl.state_dict()
