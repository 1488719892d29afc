"""Validation of a student: its scores, and how far it is from its teachers on held-out prompts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from rlcore.algorithms.distillation import DistillObjective
from rlcore.algorithms.divergence import bucketed
from rlcore.algorithms.sequences import trained_mask
from rlcore.batch import Batch
from rlcore.engines.episode import PromptSample
from rlcore.engines.train import Output
from rlcore_recipes.distillation.teachers import Teachers, teacher_columns
from rlcore_recipes.distillation.update import objective_of
from rlcore_recipes.rollouts.plan import validation_plan
from rlcore_recipes.rollouts.synchronous import roll_out_together
from rlcore_recipes.run.session import Session
from rlcore_recipes.run.trainable import Validation
from rlcore_recipes.settings.distillation import DistillConfig
from rlcore_recipes.step import add_scores, validate_completions
from rlcore_recipes.step.validation import validate_prompts


def validate_student(session: Session[DistillConfig], teachers: Teachers) -> Validation:
    """Return what `validate_completions` does, and ``val-core/{source}/divergence``: that of the loss, per token of the
    completions, where the loss has one.
    """
    if not session.config.actor.objective.divergence.coeff:
        return validate_completions(session)
    plan = validation_plan(session.config, session.stop_tokens, session.end_tokens)
    objective = objective_of(session.config, teachers)
    totals, counts = defaultdict[str, float](float), Counter[str]()

    def answered(prompts: Sequence[PromptSample]) -> Batch:
        samples = roll_out_together(session.workers, plan, prompts)
        rated = rate(session, teachers, samples.batch, objective)
        for source, (total, tokens) in session.executor.compute(divergence_by_source, rated, objective).items():
            totals[source] += total
            counts[source] += tokens
        return add_scores(session, samples.batch, samples)

    found = validate_prompts(session, answered)
    measured = {f"val-core/{source}/divergence": totals[source] / max(counts[source], 1) for source in sorted(totals)}
    return replace(found, metrics=found.metrics | measured)


def rate(session: Session[DistillConfig], teachers: Teachers, batch: Batch, objective: DistillObjective) -> Batch:
    """Return ``batch`` with the columns of its teachers, and those of the student that a divergence is made of."""
    teacher = teacher_columns(session, teachers, batch)
    batch = batch.select("tokens", "loss_mask", "data_source").with_columns(
        **{name: teacher[name] for name in teacher.names}
    )
    output: Output = "candidate_logprobs" if objective.comparison is None else "divergence"
    request = replace(objective.request, outputs=(output,), together=None)
    student = session.roles.actor.forward(batch.select("tokens", "loss_mask", *request.columns), request)
    return batch.with_columns(**{output: student[output]})


def divergence_by_source(batch: Batch, objective: DistillObjective) -> dict[str, tuple[float, int]]:
    """Return, for each ``data_source``, the sum of the divergences of all trained tokens, and their number."""
    mask = trained_mask(batch)
    if "divergence" in batch:
        values = batch.flat("divergence")
    else:
        student, teacher = (bucketed(batch.flat(f"{of}_logprobs")) for of in ("candidate", "teacher_top"))
        values = objective.settings.divergence.kind(student, teacher).sum(-1)
    rows = batch.jagged(torch.where(mask, values, 0)).to_list()
    found: dict[str, tuple[float, int]] = {}
    for source, row, trained in zip(batch["data_source"], rows, batch.jagged(mask).to_list()):
        total, count = found.get(source, (0.0, 0))
        found[source] = total + float(row.double().sum()), count + int(trained.sum())
    return found
