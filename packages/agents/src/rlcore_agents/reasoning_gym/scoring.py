"""Score answers with reasoning-gym; imported in the reward's workers only."""

from __future__ import annotations

import ast
import json
from functools import lru_cache
from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer

from rlcore.engines.reward import RewardResult, RewardSample
from rlcore_agents.reasoning_gym.evaluated import may_be_evaluated


def score(sample: RewardSample, extraction: str) -> RewardResult:
    """Return the score that the task's scorer gives, usually between 0 and 1.

    Extras, each 0 or 1: ``correct`` (the score is 1), ``answered``, and ``refused``: the answer makes the scorer fail,
    or is code that the scorer would run; it is scored as no answer.

    Raises:
        ValueError: the sample is not from ``rlcore data reasoning-gym``.
    """
    missing = [name for name in ("task", "entry", "config") if not isinstance(sample.extra.get(name), str)]
    if missing:
        raise ValueError(
            f"the row has no text {missing[0]!r}; the reward reasoning_gym scores data of rlcore data reasoning-gym"
        )
    task, entry = sample.extra["task"], ast.literal_eval(sample.extra["entry"])
    data = _data_set(task, sample.extra["config"])
    text = sample.completion.strip()
    answer = extract_answer(text) if extraction == "tag" else text or None
    refused = answer is not None and not may_be_evaluated(task, answer)
    if not refused:
        try:
            return _result(float(data.score_answer(answer, entry)), answer, refused)
        except Exception:  # scorers of 0.1.25 that expect numbers do not check that there are any
            if answer is None:
                raise
    return _result(float(data.score_answer(None, entry)), answer, refused=True)


def _result(value: float, answer: str | None, refused: bool) -> RewardResult:
    extras = {"correct": value >= 1, "answered": answer is not None, "refused": refused}
    return RewardResult(value, {name: float(number) for name, number in extras.items()}, answer)


@lru_cache(maxsize=256)
def _data_set(task: str, config: str) -> Any:
    """Return the data set, which scorers ask for its parameters."""
    return reasoning_gym.create_dataset(task, **json.loads(config))
