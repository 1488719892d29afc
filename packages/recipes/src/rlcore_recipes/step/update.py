"""Optimizer steps over a batch: epochs of mini-batches, with samples left out where that changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from rlcore.algorithms.aggregation import TRAJECTORY_TOKENS
from rlcore.algorithms.objectives import LOSS_METRICS, PolicyObjective, ValueObjective
from rlcore.batch import Batch
from rlcore.config.registry import Entry
from rlcore.engines import ForwardRequest, Objective, TrainEngine
from rlcore.metrics import Metrics
from rlcore_recipes.rollouts.trees import by_trajectories, first_rows
from rlcore_recipes.run.session import Session
from rlcore_recipes.step.advantages import without_advantage
from rlcore_recipes.step.non_finite import IN_LOSS

LEFT_OUT = "left_out/"
OF_TREES = ("trajectory", "shared_prefix", TRAJECTORY_TOKENS)


def update_policy(session: Session[Any], batch: Batch) -> Metrics:
    """Train the policy on ``batch``; return metrics under ``actor/``."""
    config = session.config
    size, loss = config.mini_batch_size * config.rollout.n, config.actor.objective.policy_loss.entry
    with session.timed("update_actor"):
        return _update_policy(session, mini_batches(batch, size, loss))


def imitate(session: Session[Any], batch: Batch) -> Metrics:
    """Train the policy on the samples of ``batch`` whose ``sample_weight`` is not 0; return metrics under ``actor/``.

    They are divided evenly among as many mini-batches as a whole batch makes, so that the number of optimizer steps,
    which the learning-rate schedule counts, does not depend on how many samples are kept. There are fewer steps only
    where there are fewer samples.
    """
    config = session.config
    loss = config.actor.objective.policy_loss.entry
    with session.timed("update_actor"):
        parts = kept_parts(batch, config.data.train_batch_size // config.mini_batch_size)
        return _update_policy(session, [mini_batches(part, len(part), loss)[0] for part in parts])


def kept_parts(batch: Batch, count: int) -> list[Batch]:
    """Return the trajectories with a ``sample_weight`` in at most ``count`` parts, none empty, whose sizes differ by
    1."""
    kept = batch.filter(batch["sample_weight"] > 0)
    starts = [*first_rows(kept).nonzero().flatten().tolist(), len(kept)]
    total = len(starts) - 1
    count = min(count, total)
    ends = [starts[total * number // count] for number in range(count + 1)] if count else [0]
    return [kept.slice(start, end) for start, end in pairwise(ends)]


def _update_policy(session: Session[Any], batches: Sequence[Batch]) -> Metrics:
    """Make the optimizer steps of all epochs over mini-batches."""
    config, actor = session.config, session.roles.actor
    settings = config.actor
    objective = PolicyObjective(
        settings.objective, config.rollout.temperature, old_from_rollout=settings.old_logprobs == "rollout"
    )
    parts: list[tuple[Batch, Objective]] = [(batch, objective) for batch in batches]
    if settings.drops_zero_advantage:
        keep = actor.dp_size
        parts = [session.executor.compute(without_zero_advantage, part, objective, keep) for part, _ in parts]
    return train_epochs(actor, parts, settings.epochs).prefixed("actor/")


def update_critic(session: Session[Any], batch: Batch) -> Metrics:
    """Train the critic on ``batch``; return metrics under ``critic/``. Nothing without a critic."""
    config, critic, settings = session.config, session.roles.critic, session.config.critic_role
    if critic is None or settings is None:
        return Metrics()
    prompts, epochs = config.critic_sizes
    with session.timed("update_critic"):
        objective = ValueObjective(settings.objective)
        parts = [(part, objective) for part in mini_batches(batch, prompts * config.rollout.n)]
        metrics = train_epochs(critic, parts, epochs).prefixed("critic/")
        if settings.offload:
            critic.offload()
    return metrics


def train_epochs(engine: TrainEngine, parts: Sequence[tuple[Batch, Objective]], epochs: int) -> Metrics:
    """Make one optimizer step for each mini-batch with its objective, ``epochs`` times over; return metrics."""
    return Metrics.merge(engine.train(part, objective) for _ in range(epochs) for part, objective in parts)


def mini_batches(batch: Batch, size: int, loss: Entry[Any] | None = None) -> list[Batch]:
    """Split into mini-batches of ``size`` trajectories, without rows that were taken out of the loss.

    These have no trained token, so that nothing changes; but a model that computes NaN for one of them would have NaN
    gradients. They stay where a unit of ``loss`` or a whole mini-batch would be torn.

    Raises:
        BatchError: a mini-batch would divide a unit of ``loss``, or a column is missing.
    """
    together = None if loss is None else loss.together
    columns = training_columns(batch, loss)
    if "trajectory" in batch:
        parts = by_trajectories(columns, size, together)
    else:
        parts = columns.split(size, together)
    if IN_LOSS not in batch:
        return parts
    stays = [part.clone() for part in batch[IN_LOSS].split([len(part) for part in parts])]
    for part, kept in zip(parts, stays):
        if together is not None:
            kept |= torch.isin(part[together], part[together][kept])
        kept |= ~kept.any()
    return [part.filter(kept) for part, kept in zip(parts, stays)]


def training_columns(batch: Batch, loss: Entry[Any] | None = None) -> Batch:
    """Return what objectives may read: per-token columns, what rows of trees share, and what the policy loss declares.

    Raises:
        BatchError: ``batch`` has no such column as the policy loss declares.
    """
    names = [*batch.jagged_names, *(name for name in OF_TREES if name in batch)]
    if loss is not None:
        loss.check_columns({*batch.names, "entropy"})  # the entropy is computed in the update
        names += sorted(loss.required_columns & set(batch.names))
    return batch.select(*dict.fromkeys(names))


@dataclass(frozen=True)
class CountingLeftOut:
    """``objective`` on the samples that stay, with the denominators of all; those left out are recorded in columns.

    The losses in its metrics are those of all samples too. Its other metrics are means over the samples that stay.
    """

    objective: Objective

    @property
    def request(self) -> ForwardRequest:
        return self.objective.request

    def denominators(self, batch: Batch) -> dict[str, float]:
        counted = self.objective.denominators(batch)
        return {name: value + float(batch[f"{LEFT_OUT}{name}"].sum()) for name, value in counted.items()}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        loss, metrics = self.objective.loss(outputs, batch, denominators)
        tokens = batch[f"{LEFT_OUT}tokens"].sum()
        for name in LOSS_METRICS:
            if name in metrics:
                metrics.mean(name, 0.0, tokens)
        return loss, metrics


def without_zero_advantage(batch: Batch, objective: Objective, keep: int) -> tuple[Batch, Objective]:
    """Return the samples with an advantage that is not 0, and an objective that still counts the others.

    A token without advantage adds nothing to a policy-gradient loss or its gradient, so only the denominators must know
    of it. The first sample that stays carries what the others would have added to them. At least ``keep`` samples stay,
    so that every rank takes part and the optimizer makes its step. Units of the objective stay or go as a whole.
    """
    nonzero = ~without_advantage(batch)
    stays = nonzero.clone()
    stays[(~nonzero).nonzero().squeeze(-1)[: max(keep - int(nonzero.sum()), 0)]] = True
    together = objective.request.together
    if together is not None:
        stays = torch.isin(batch[together], batch[together][stays])
    kept = batch.take(stays.nonzero().squeeze(-1))
    everything, remaining = objective.denominators(batch), objective.denominators(kept)
    first = torch.zeros(len(kept), dtype=torch.float64)
    first[0] = 1
    missing = {f"{LEFT_OUT}{name}": first * (value - remaining[name]) for name, value in everything.items()}
    return kept.with_columns(**missing), CountingLeftOut(objective)
