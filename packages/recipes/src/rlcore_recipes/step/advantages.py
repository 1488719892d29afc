"""Advantage estimation: from scores to advantages."""

from __future__ import annotations

from typing import Any

import torch

from rlcore.algorithms.aggregation import TRAJECTORY_TOKENS
from rlcore.algorithms.kl import KLController, apply_kl_penalty
from rlcore.algorithms.sequences import sequence_sums, trained_counts, trained_mask
from rlcore.algorithms.shaping import overlong_punishment, terminal_rewards
from rlcore.algorithms.turns import turn_sequences
from rlcore.batch import Batch
from rlcore.metrics import Metrics
from rlcore_recipes.rollouts.trees import trajectory_tokens
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings import AlgorithmSettings
from rlcore_recipes.step.credit import estimator_view
from rlcore_recipes.step.non_finite import IN_LOSS, containment, described

GRADIENTLESS, SINGLE = "actor/zero_advantage_ratio", "reward/single_sample_groups"
NON_FINITE = "rollout/non_finite_samples"
MOSTLY = 0.5  # the share of an update's tokens from which on it is worth a warning


def add_advantages(session: Session[Any], batch: Batch) -> tuple[Batch, Metrics]:
    """Add the columns of `advantages`; the KL penalty's coefficient, if there is one, adapts to the batch."""
    config = session.config
    unread = [name for name in batch.object_names if name not in config.algorithm.advantage.entry.required_columns]
    with session.timed("adv"):
        found, metrics, kl, odd = session.executor.compute(
            contained_advantages, batch.drop(*unread), config.algorithm, session.kl, config.data.max_response_length
        )
    if session.kl is not None:
        session.kl.load_state_dict(kl)
    if odd:
        session.warn_once(NON_FINITE, f"{odd}. {NON_FINITE} has their number in every step")
    if "sample_weight" not in batch:  # samples without a weight are not in the update
        warn_of_gradientless(session, metrics)
    return batch.with_columns(**{name: found[name] for name in found.names}), metrics


def contained_advantages(
    batch: Batch, algorithm: AlgorithmSettings, kl: KLController | None, max_response_length: int
) -> tuple[Batch, Metrics, dict[str, Any], str]:
    """Take samples with numbers that are not finite out of the loss (`rlcore_recipes.step.non_finite`), then call
    `advantages`; return its result, with the columns that this replaces, and ``in_loss`` if there were any; and where
    the first such number is, in words.

    ``rollout/non_finite_samples`` counts those samples. Advantages that are not finite are contained too. Invalid
    trajectories are not in the loss either. Rows of trees get ``trajectory_tokens`` (`rlcore.algorithms.aggregation`).
    """
    replaced, found = containment(batch)
    batch = batch.with_columns(**replaced)
    columns, metrics, state = advantages(batch, algorithm, kl, max_response_length)
    batch = batch.with_columns(**{name: columns[name] for name in columns.names})
    again, further = containment(batch)
    found = further | found
    metrics.sum(NON_FINITE, len(found))
    if len(found) == len(batch):
        again = {}
    changed = batch.with_columns(**again).select(*dict.fromkeys([*replaced, *columns.names, *again]))
    if "trajectory" in batch:
        changed = changed.with_columns(**{TRAJECTORY_TOKENS: trajectory_tokens(batch.with_columns(**again))})
    in_loss = torch.tensor([row not in found for row in range(len(batch))], dtype=torch.bool)
    if "valid" in batch:
        in_loss &= batch["valid"]
    if replaced or again or ("valid" in batch and not batch["valid"].all()):
        changed = changed.with_columns(**{IN_LOSS: in_loss})
    return changed, metrics, state, described(batch, found) if found else ""


def advantages(
    batch: Batch, algorithm: AlgorithmSettings, kl: KLController | None, max_response_length: int
) -> tuple[Batch, Metrics, dict[str, Any]]:
    """Return the per-token columns ``token_rewards``, ``advantages`` and, for a critic, ``returns``; metrics; and the
    new state of ``kl``.

    The score is on the last token of each completion, but for what ``step_rewards`` put on others; shaping and the KL
    penalty come before the estimator.
    ``actor/zero_advantage_ratio`` is the share of trained tokens in samples whose advantages are all 0, and
    ``reward/single_sample_groups``, of estimators that compare within groups, the share of groups with one sample.

    Args:
        batch: all columns; of objects, only those that the estimator needs must be there.
        kl: holds the coefficient of the KL penalty, and adapts it; None without a penalty.
    """
    view = estimator_view(batch, algorithm)
    columns, metrics = estimated(batch if view is None else view.batch, algorithm, kl, max_response_length)
    if view is not None:
        columns = view.back(columns, batch)
    tokens = trained_counts(trained_mask(batch), batch.lengths)
    idle = without_advantage(batch.with_columns(advantages=columns["advantages"]))
    metrics.mean(GRADIENTLESS, float(tokens[idle].sum()) / max(float(tokens.sum()), 1.0))
    return columns, metrics, {} if kl is None else kl.state_dict()


def estimated(
    batch: Batch, algorithm: AlgorithmSettings, kl: KLController | None, max_response_length: int
) -> tuple[Batch, Metrics]:
    """Return the columns and metrics of `advantages` for the sequences that the estimator compares."""
    scores, metrics = batch["score"], Metrics()
    if not len(batch):  # every episode was invalid
        nothing = batch.jagged(torch.zeros(0))
        return Batch({"token_rewards": nothing, "advantages": nothing, "returns": nothing}), metrics
    if algorithm.overlong is not None:
        punishment = overlong_punishment(batch["response_length"], max_response_length, algorithm.overlong)
        scores = scores + punishment
        metrics.mean("reward/overlong_punishment", float(punishment.mean()))
    batch = batch.with_columns(token_rewards=batch.jagged(rewards_of(batch, scores)))
    if algorithm.kl_in_reward is not None and kl is not None:
        batch, measured = apply_kl_penalty(batch, algorithm.kl_in_reward.estimator, kl)
        metrics.update(measured.prefixed("actor/"))
    algorithm.advantage.entry.check_columns(batch.names)
    found = algorithm.advantage(turn_sequences(batch, algorithm.turn_discount) if algorithm.credit == "turn" else batch)
    if "compares_group" in algorithm.advantage.entry.traits:
        sizes = torch.unique(batch["group"], return_counts=True)[1]
        metrics.mean(SINGLE, float((sizes == 1).sum()) / max(len(sizes), 1))
    columns = {"token_rewards": batch["token_rewards"], "advantages": batch.jagged(found.advantages)}
    if found.returns is not None:
        columns["returns"] = batch.jagged(found.returns)
    return Batch(columns), metrics


def rewards_of(batch: Batch, scores: torch.Tensor) -> torch.Tensor:
    """Return token rewards ``[T]`` that add up to ``scores`` ``[B]``: ``step_rewards``, the rest on the last token."""
    if "step_rewards" not in batch:
        return terminal_rewards(batch, scores)
    steps = batch.flat("step_rewards")
    return terminal_rewards(batch, scores - sequence_sums(steps, batch.lengths)) + steps


def without_advantage(batch: Batch) -> torch.Tensor:
    """Return the mask of samples that have the advantage 0 on every trained token, ``[B]`` bool on the CPU."""
    nonzero = trained_mask(batch) & (batch.flat("advantages") != 0)  # NaN is not 0: it must not be left out unseen
    return trained_counts(nonzero, batch.lengths) == 0


def warn_of_gradientless(session: Session[Any], metrics: Metrics) -> None:
    """Warn, once in a run, of groups that cannot be compared and of updates that are mostly without policy gradient."""
    found, actor = metrics.to_dict(), session.config.actor
    if found.get(SINGLE):
        session.warn_once(
            SINGLE,
            f"{found[SINGLE]:.0%} of the groups of a step have a single sample: "
            f"{session.config.algorithm.advantage.name} has nothing to compare it with and gives it the advantage 0. "
            f"{SINGLE} has the share of every step",
        )
    reasons = actor.trains_without_advantage
    if found[GRADIENTLESS] >= MOSTLY and actor.drop_zero_advantage is None and reasons:
        session.warn_once(
            GRADIENTLESS,
            f"{found[GRADIENTLESS]:.0%} of the tokens of an update have no policy gradient, as their advantages are 0. "
            f"They are trained on because of {', '.join(f'actor.{reason}' for reason in reasons)}; without it they "
            f"would be left out of the update, which takes less time. {GRADIENTLESS} has the share of every step",
        )
