"""Generate and score: a batch of trajectories with scores, out of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlcore.batch import Batch
from rlcore_recipes.data.prompts import PromptSample
from rlcore_recipes.rollouts import generate, greedy, training_sampling
from rlcore_recipes.scoring import score

if TYPE_CHECKING:
    from rlcore_recipes.session import Session


def generate_and_score(session: Session[Any], prompts: Sequence[PromptSample]) -> Batch:
    """``rollout.n`` scored completions of each prompt: see `trajectories` and `score` for the columns.

    If the advantage estimator needs it (ReMax), also ``baseline_score`` (dense fp32): that of a greedy completion of the
    same prompt.
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
