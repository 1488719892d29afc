"""Generate and score: a batch of trajectories with scores, out of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlcore.batch import Batch
from rlcore.config import Choice
from rlcore.controller import Pending
from rlcore.engines import SamplingParams
from rlcore.progress import report
from rlcore_recipes.data.prompts import PromptSample
from rlcore_recipes.reward_model import model_values, with_model_scores
from rlcore_recipes.rollouts import (
    SamplingJob,
    greedy,
    sample_as_completed,
    sample_together,
    training_sampling,
)
from rlcore_recipes.scoring import Scorer

if TYPE_CHECKING:
    from rlcore_recipes.session import Session


Judge = Callable[["Session[Any]", Batch], Batch]
"""Adds what models think of samples, which need no scores for that."""


def training_batch(session: Session[Any], number: int, judged: Judge) -> tuple[Batch, dict[str, float]]:
    """The scored and ``judged`` groups that step ``number`` trains on, and metrics of how they came about.

    Prompts, ``rollout.n`` completions of each, are generated for now, or were while earlier steps trained. With dynamic
    sampling groups that teach nothing are left out.
    """
    if session.producer is not None:
        with session.timed("gen"):
            batch, sampled = session.producer.take(number)
        values = None if session.roles.reward_model is None else model_values(session, batch)
        batch = judged(session, batch)
        return batch if values is None else with_model_scores(session, batch, values), sampled
    if session.dynamic is not None:
        batch, sampled = refill(session, session.dynamic.filter, session.dynamic.max_generations)
        return judged(session, batch), sampled
    return generate_and_score(session, next(session.prompts), judged), {}


def generate_and_score(session: Session[Any], prompts: Sequence[PromptSample], judged: Judge | None = None) -> Batch:
    """``rollout.n`` scored completions of each prompt: see `trajectories` and `Scorer.score` for the columns.

    If the advantage estimator needs it (ReMax), also ``baseline_score`` (dense fp32): that of a greedy completion of
    the same prompt.

    Args:
        judged: its columns are added. Where models run beside rewards, they judge while rewards are computed, unless
            more is generated first.
    """
    config, timed = session.config, session.timed
    sampling = training_sampling(config.rollout, config.data.max_response_length, session.stop_tokens)
    baseline = "baseline_score" in config.needed_columns
    meanwhile = judged if session.executor.overlaps and not baseline else None
    with timed("gen"):
        batch = sampled_and_scored(session, prompts, sampling, config.rollout.n, meanwhile=meanwhile)
    if baseline:
        with timed("gen_baseline"):
            scores = sampled_and_scored(session, prompts, greedy(sampling), 1)["score"]
        batch = batch.with_columns(baseline_score=scores.repeat_interleave(config.rollout.n))
    if meanwhile is not None:
        return batch
    release(session)
    return batch if judged is None else judged(session, batch)


def sampled_and_scored(
    session: Session[Any],
    prompts: Sequence[PromptSample],
    sampling: SamplingParams,
    n: int,
    purpose: str = "train",
    meanwhile: Judge | None = None,
) -> Batch:
    """``n`` scored completions of each prompt, in the order of the prompts.

    Where rewards run beside the rollout, each prompt's completions are scored as soon as they are there. A reward model
    scores them all together, and ``meanwhile`` adds columns, while rewards that are still missing are computed.
    """
    executor, roles, timed = session.executor, session.roles, session.timed
    jobs = [SamplingJob(prompt, sampling, n, session.config.seed, purpose) for prompt in prompts]
    places: list[int] = []
    parts: list[Batch] = []
    scores: list[Pending[Batch]] = []
    if executor.overlaps:
        roles.rollout.wake()
    for answered, part in executor.stream(
        roles.rollout, sample_as_completed if executor.overlaps else sample_together, jobs
    ):
        places += answered
        parts.append(part)
        if executor.overlaps:
            report("prompts answered", len(places), len(jobs))
            with timed.label("reward"):
                scores.append(executor.one(roles.reward, Scorer.score, part))
    order = torch.tensor(places, dtype=torch.int64).argsort()
    rows = (order[:, None] * n + torch.arange(n)).flatten()
    batch = type(parts[0]).concat(parts).take(rows)  # first of all: results must not depend on who was ready first
    if meanwhile is not None:
        release(session)
    values = None if roles.reward_model is None else model_values(session, batch)
    if meanwhile is not None:
        batch = meanwhile(session, batch)
    with timed("reward"):
        if not executor.overlaps:
            scores = [executor.one(roles.reward, Scorer.score, part) for part in parts]
        scored = []
        for number, score in enumerate(scores, 1):
            scored.append(score.result())
            if executor.overlaps:
                report("prompts scored", number, len(scores))
    batch = with_columns_of(batch, type(scored[0]).concat(scored).take(rows))
    return batch if values is None else with_model_scores(session, batch, values)


def with_columns_of(batch: Batch, other: Batch) -> Batch:
    return batch.with_columns(**{name: other[name] for name in other.names})


def release(session: Session[Any]) -> None:
    """Let the rollout engine give its memory back, as configured, or where its weights are about to be trained.

    One that always generates keeps it.
    """
    if session.producer is not None:
        return
    if session.config.rollout.free_memory or (session.executor.overlaps and session.roles.rollout.shares_weights):
        session.roles.rollout.sleep()


def refill(session: Session[Any], keep: Choice, max_generations: int) -> tuple[Batch, dict[str, float]]:
    """``data.train_batch_size`` scored groups that ``keep`` lets pass, in the order of their prompts.

    The first round generates for as many prompts as are wanted; each later one for as many as are likely to fill what
    is missing, going by the share of groups kept so far. Surplus groups are dropped: they would be off-policy in the
    next step. After ``max_generations`` rounds, groups that did not pass fill the rest, as they would in GRPO, so that
    a task that is solved (or hopeless) ends no run.

    Args:
        keep: a sampling filter.

    Returns:
        the batch, and metrics: rounds of generation, groups generated for, and the shares of them that passed and of
        the batch that had to be filled.
    """
    wanted, n = session.config.data.train_batch_size, session.config.rollout.n
    kept: list[Batch] = []
    dropped: list[Batch] = []
    passed = drawn = rounds = 0
    while passed < wanted and rounds < max_generations:
        likely = wanted if not passed else math.ceil((wanted - passed) * drawn / passed)
        prompts = [prompt for _ in range(min(likely, wanted)) for prompt in next(session.prompts)]
        batch = generate_and_score(session, prompts)
        passes = keep(batch["score"], batch["group"])
        kept.append(batch.filter(passes))
        dropped.append(batch.filter(~passes))
        passed += len(kept[-1]) // n
        drawn += len(prompts)
        rounds += 1
    missing = max(wanted - passed, 0)
    return type(batch).concat([*kept, *dropped]).slice(0, wanted * n), {
        "dynamic_sampling/rounds": float(rounds),
        "dynamic_sampling/groups": float(drawn),
        "dynamic_sampling/passed": passed / drawn,
        "dynamic_sampling/unfilled": missing / wanted,
    }
