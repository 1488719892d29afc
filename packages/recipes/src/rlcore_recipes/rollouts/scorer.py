"""From trajectories to rewards."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import torch

from rlcore import plugins
from rlcore.batch import Batch
from rlcore.controller import Dispatch, dispatch
from rlcore.engines import ModelSettings, Reward, RewardResult, RewardSample
from rlcore.engines.reward import result_problem
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.rollouts.completion_text import joined_turns, policy_turns
from rlcore_recipes.rollouts.trees import first_rows, trajectory_index, turn_rewards
from rlcore_recipes.settings import RewardRole

logger = logging.getLogger(__name__)


INVALID = RewardResult(0.0, error="invalid")
"""The result of an episode in which something failed; `TreeRows.error_score` may give it another score."""


@dataclass(frozen=True)
class Scorer:
    """The engine of the reward role: a reward, and the tokenizer that gives it texts.

    Attributes:
        error_score: of samples for which the reward returns what cannot be used, such as a score that is not finite.
        ends: None where the reward reads no special tokens; else the only ones that it does not read (see
            `completion_texts`).
    """

    reward: Reward
    tokenizer: Any
    error_score: float = 0.0
    ends: frozenset[int] | None = None

    def score(self, batch: Batch) -> Batch:
        """``score`` (dense fp32), ``reward_result`` (objects) and ``completion`` (objects: the text).

        The reward scores every trajectory once in which nothing failed; all of its rows have the result. The score is
        that of the reward and the rewards of turns together. The others get `INVALID`, or their ``episode_score``.
        """
        turns, index, first = policy_turns(batch), trajectory_index(batch), first_rows(batch)
        texts = joined_turns(turns, self.tokenizer, self.ends)
        asked = first & complete_rows(batch)
        results = failed_results(batch.filter(first)) if "invalid" in batch else [INVALID] * len(turns)
        chosen = asked[first].nonzero().flatten().tolist()
        samples = reward_samples(
            batch.filter(asked),
            [texts[number] for number in chosen],
            [list(chain.from_iterable(turns[number])) for number in chosen],
        )
        for number, result in zip(chosen, checked(self.reward.score_batch(samples), self.error_score)):
            results[number] = result
        scores = torch.tensor([result.score for result in results], dtype=torch.float32)
        rows = index.tolist()
        return Batch(
            {
                "score": (scores + turn_rewards(batch))[index],
                "reward_result": [results[number] for number in rows],
                "completion": [texts[number] for number in rows],
            }
        )

    @dispatch(Dispatch.BROADCAST)
    def close(self) -> None:
        """Release what the reward holds."""
        self.reward.close()


def score(scorer: Scorer, trajectories: Batch) -> Batch:
    """Return the columns of `Scorer.score` for ``trajectories``."""
    return scorer.score(trajectories)


def reward_of(role: RewardRole) -> Reward:
    """Build the reward that ``role`` names."""
    return plugins.get(role.plugin_group, role.name).build(role.options, role)  # type: ignore[no-any-return]


def build_scorer(role: RewardRole, model: ModelSettings, ends: frozenset[int], engines: Mapping[str, Any]) -> Scorer:
    """Build the scorer that ``role`` names, for completions of ``model`` that end with ``ends``."""
    kept = ends if role.keep_special_tokens else None
    return Scorer(reward_of(role), load_tokenizer(model), role.error_score, kept)


def complete_rows(batch: Batch) -> torch.Tensor:
    """Return which rows are of a trajectory in which nothing failed, ``[B]`` bool."""
    reasons = batch["invalid"] if "invalid" in batch else [""] * len(batch)
    return torch.tensor([not reason for reason in reasons], dtype=torch.bool)


def failed_results(batch: Batch) -> list[RewardResult]:
    """Return the result of each row as if something had failed in it: with its ``episode_score`` if it has one."""
    scores = batch["episode_score"].tolist()
    return [INVALID if math.isnan(score) else replace(INVALID, score=score) for score in scores]


def checked(results: Sequence[RewardResult], error_score: float) -> list[RewardResult]:
    """``results``, of which those that cannot be used have become failed ones (kind "result")."""
    found, problems = [], Counter[str]()
    for result in results:
        problem = result_problem(result)
        found.append(result if problem is None else RewardResult(error_score, error="result"))
        problems.update([problem] if problem is not None else [])
    if problems:
        logger.warning(
            "%d of %d samples get error_score=%g, because the reward returned %s",
            problems.total(),
            len(results),
            error_score,
            problems.most_common(1)[0][0],
        )
    return found


def reward_samples(batch: Batch, texts: list[str], completions: list[list[int]]) -> list[RewardSample]:
    """Return what a reward is given for each row of ``batch``."""
    return [
        RewardSample(
            prompt=messages,
            completion=text,
            ground_truth=truth,
            data_source=source,
            extra=extra,
            finish_reason=reason,
            completion_tokens=tokens,
            prompt_text=prompt_text,
            transcript=transcript,
            episode_score=None if episode_score is None or math.isnan(episode_score) else episode_score,
        )
        for messages, prompt_text, text, truth, source, extra, reason, tokens, transcript, episode_score in zip(
            batch["messages"],
            batch["prompt_text"],
            texts,
            batch["ground_truth"],
            batch["data_source"],
            batch["extra"],
            batch["finish_reason"],
            completions,
            batch["transcript"] if "transcript" in batch else repeat(()),
            batch["episode_score"].tolist() if "episode_score" in batch else repeat(None),
        )
    ]
