"""Generate and score: a batch of trajectories with scores, out of prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlcore.batch import Batch
from rlcore.config import Choice
from rlcore_recipes.data.prompts import PromptSample
from rlcore_recipes.rollouts import generate, greedy, training_sampling
from rlcore_recipes.scoring import score

if TYPE_CHECKING:
    from rlcore_recipes.session import Session


def generate_and_score(session: Session[Any], prompts: Sequence[PromptSample]) -> Batch:
    """``rollout.n`` scored completions of each prompt: see `trajectories` and `score` for the columns.

    If the advantage estimator needs it (ReMax), also ``baseline_score`` (dense fp32): that of a greedy completion of
    the same prompt.
    """
    config, roles, timed = session.config, session.roles, session.timed
    sampling = training_sampling(config.rollout, config.data.max_response_length)
    with timed("gen"):
        batch = generate(roles.rollout, prompts, sampling, config.rollout.n, config.seed)
    with timed("reward"):
        batch = score(roles.reward, session.tokenizer, batch)
    if "baseline_score" in config.algorithm.advantage.entry.needs:
        with timed("gen_baseline"):
            baseline = generate(roles.rollout, prompts, greedy(sampling), 1, config.seed)
            scores = score(roles.reward, session.tokenizer, baseline)["score"]
        batch = batch.with_columns(baseline_score=scores.repeat_interleave(config.rollout.n))
    if config.rollout.free_memory:
        roles.rollout.sleep()
    return batch


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
    return Batch.concat([*kept, *dropped]).slice(0, wanted * n), {
        "dynamic_sampling/rounds": float(rounds),
        "dynamic_sampling/groups": float(drawn),
        "dynamic_sampling/passed": passed / drawn,
        "dynamic_sampling/unfilled": missing / wanted,
    }
