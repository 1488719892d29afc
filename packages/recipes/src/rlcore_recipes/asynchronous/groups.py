"""What worker processes do for a group: the completions of one prompt, and their scores."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlcore.batch import Batch
from rlcore.engines import RolloutEngine
from rlcore.errors import EngineError
from rlcore_recipes.data.prompts import PromptSample
from rlcore_recipes.rollouts import SamplingJob, greedy, sample_one, training_sampling
from rlcore_recipes.scoring import Scorer
from rlcore_recipes.settings import RLConfig


@dataclass(frozen=True)
class GroupJob:
    """What is asked of a rollout engine for one prompt.

    Attributes:
        baseline: a greedy completion, for advantage estimators that compare with its score (ReMax).
    """

    sampled: SamplingJob
    baseline: SamplingJob | None = None


def group_job(config: RLConfig, prompt: PromptSample, stop_tokens: tuple[int, ...] = ()) -> GroupJob:
    """What is asked of a rollout engine for ``prompt``; ``stop_tokens`` as in `training_sampling`."""
    sampling = training_sampling(config.rollout, config.data.max_response_length, stop_tokens)
    job = SamplingJob(prompt, sampling, config.rollout.n, config.seed)
    if "baseline_score" not in config.needed_columns:
        return GroupJob(job)
    return GroupJob(job, replace(job, sampling=greedy(sampling), n=1, purpose="baseline"))


async def sample_group(engine: RolloutEngine, job: GroupJob) -> tuple[Batch, ...]:
    """The trajectories of ``job.sampled`` and, if asked for, of ``job.baseline``."""
    jobs = [job.sampled] if job.baseline is None else [job.sampled, job.baseline]
    return tuple(await asyncio.gather(*(sample_one(engine, one) for one in jobs)))


def score_group(scorer: Scorer, sampled: Sequence[Batch]) -> Batch:
    """The columns of `Scorer.score` for the first of ``sampled``; with a second one also ``baseline_score``, its score
    for every sample."""
    scores = scorer.score(sampled[0])
    if len(sampled) == 1:
        return scores
    baseline = scorer.score(sampled[1])["score"]
    return scores.with_columns(baseline_score=baseline.repeat_interleave(len(sampled[0])))


def check_fresh(batch: Batch, step: int, max_staleness: int) -> None:
    """Make sure that no token of ``batch`` is older than ``max_staleness`` versions when ``step`` trains on it.

    Raises:
        EngineError: one is; as groups are scheduled, only by an engine that did not take over weights or miscounts.
    """
    made = batch["response_length"] > 0
    staleness = int((step - 1 - batch["policy_version"])[made].max()) if bool(made.any()) else 0
    if staleness > max_staleness:
        raise EngineError(
            f"a sample for step {step} has tokens that are {staleness} versions old, and async.max_staleness is "
            f"{max_staleness}: the rollout engine reports an older version than it was given weights of"
        )
