"""Distillation: a student learns from teachers, on its own completions or on given ones (GKD, arXiv:2306.13649)."""

from __future__ import annotations

from functools import partial

from rlcore.cli import run_recipe_module
from rlcore_recipes.distillation.checks import check_teachers
from rlcore_recipes.distillation.teachers import Teachers, open_teachers, teacher_columns
from rlcore_recipes.distillation.update import add_teacher, update_student
from rlcore_recipes.distillation.validation import validate_student
from rlcore_recipes.run.loop import train
from rlcore_recipes.run.open import open_session, rl_run
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings.distillation import DistillConfig
from rlcore_recipes.step import (
    add_advantages,
    add_logprobs,
    add_scores,
    rollouts,
    step_metrics,
    sync_weights,
)


@restarting
def run(config: DistillConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    with open_session(config, check_teachers) as session:
        teachers = open_teachers(session)
        validate = partial(validate_student, teachers=teachers)
        train(rl_run("distill", session, partial(step, session, teachers), validate))


def step(session: Session[DistillConfig], teachers: Teachers, number: int) -> dict[str, float]:
    """Generate (or take from the data), have the teachers rate each token, learn."""
    samples = rollouts(session, number)
    rated = teacher_columns(session, teachers, samples.batch)  # over Ray, while rewards are computed
    batch = add_logprobs(session, samples.batch)
    batch = add_scores(session, batch, samples)
    batch, metrics = add_advantages(session, batch)  # of the task reward, if there is one
    batch, measured = add_teacher(session, batch, rated)
    metrics |= measured
    metrics |= update_student(session, teachers, batch)
    metrics |= sync_weights(session, version=number)
    return step_metrics(session, batch, number) | samples.metrics | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("distill")
