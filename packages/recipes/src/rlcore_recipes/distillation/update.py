"""The student's advantages and optimizer steps."""

from __future__ import annotations

import torch

from rlcore.algorithms.distillation import GIVEN, DistillObjective
from rlcore.algorithms.sequences import per_token, trained_mask
from rlcore.batch import Batch
from rlcore.engines import Comparison, Objective
from rlcore.metrics import Metrics
from rlcore_recipes.distillation.chunks import CHUNK, CHUNK_LOGPROBS, chunk_differences, chunk_metrics
from rlcore_recipes.distillation.teachers import OUTPUT_LAYER, Teachers
from rlcore_recipes.rollouts.given import GIVEN_REASON
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings.distillation import DistillConfig
from rlcore_recipes.step.advantages import GRADIENTLESS, without_advantage
from rlcore_recipes.step.update import mini_batches, train_epochs


def add_teacher(session: Session[DistillConfig], batch: Batch, teacher: Batch) -> tuple[Batch, Metrics]:
    """Add the columns of `teacher_columns`, and `learned`: the teacher's advantages, and what the data set gave."""
    batch = batch.with_columns(**{name: teacher[name] for name in teacher.names})
    needed = [
        name for name in ("teacher_logprobs", CHUNK, CHUNK_LOGPROBS, "old_logprobs", "advantages") if name in batch
    ]
    with session.timed("adv"):
        found, metrics = session.executor.compute(
            learned, batch.select("loss_mask", "finish_reason", *needed), session.config.distill.advantage_coeff
        )
    return batch.with_columns(**{name: found[name] for name in found.names}), metrics


def learned(batch: Batch, coeff: float) -> tuple[Batch, Metrics]:
    """Return ``advantages`` of the sampled completions and ``given_mask`` of those that the data set gave; metrics.

    The advantage of a sampled token gets −coeff · (log π − log π_teacher), whose expectation is minus the reverse KL at
    that token; across tokenizers, the difference of the chunk of text that it is in. A completion of the data set is no
    sample of the policy, and has no advantages.
    """
    mask, metrics = trained_mask(batch), Metrics()
    of_data = torch.tensor([reason == GIVEN_REASON for reason in batch["finish_reason"]])
    given = mask & per_token(of_data, batch.lengths)
    sampled = mask & ~given
    advantages = batch.flat("advantages")
    if coeff and CHUNK in batch:
        differences = chunk_differences(batch, batch.flat("old_logprobs"))
        advantages, metrics = advantages + coeff * differences, chunk_metrics(batch, differences, sampled)
    elif coeff:
        difference = batch.flat("old_logprobs") - batch.flat("teacher_logprobs")
        advantages = advantages - coeff * difference
        metrics.mean("distill/sampled_reverse_kl", difference[sampled].mean(), sampled.sum())
    metrics.mean("distill/given_fraction", of_data.float().mean())
    columns = {"advantages": batch.jagged(torch.where(sampled, advantages, 0)), GIVEN: batch.jagged(given.float())}
    gradientless = per_token(without_advantage(batch.with_columns(**columns)), batch.lengths)
    metrics.mean(GRADIENTLESS, mask[gradientless].sum() / mask.sum().clamp(min=1))
    return Batch(columns), metrics


def update_student(session: Session[DistillConfig], teachers: Teachers, batch: Batch) -> Metrics:
    """Train the student on ``batch``; return metrics under ``actor/``."""
    config, settings, objective = session.config, session.config.actor, objective_of(session.config, teachers)
    size = config.mini_batch_size * config.rollout.n
    with session.timed("update_actor"):
        loss = settings.objective.policy_loss.entry
        parts: list[tuple[Batch, Objective]] = [(part, objective) for part in mini_batches(batch, size, loss)]
        return train_epochs(session.roles.actor, parts, settings.epochs).prefixed("actor/")


def objective_of(config: DistillConfig, teachers: Teachers) -> DistillObjective:
    """Return the student's loss."""
    settings, comparison = config.actor.objective, None
    if settings.divergence.coeff and settings.divergence.top_k is None:
        comparison = Comparison(settings.divergence.kind, "teacher_states", OUTPUT_LAYER, teachers.vocabulary)
    return DistillObjective(
        settings,
        config.rollout.temperature,
        policy=config.has_advantages,
        comparison=comparison,
        old_from_rollout=config.actor.old_logprobs == "rollout",
    )
