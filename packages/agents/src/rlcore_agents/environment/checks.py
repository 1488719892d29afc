"""Checks of what code of an environment returned; each raises `EnvironmentFailure`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlcore.engines.reward import LARGEST_SCORE
from rlcore_agents.environment.environment import Step
from rlcore_agents.environment.exchange import EnvironmentFailure

MAX_INFO_BYTES = 1 << 20


def number(value: Any, what: str) -> float:
    """Return ``value``, a number of Python, NumPy or torch, as a finite float."""
    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise EnvironmentFailure(f"{what} is {short(value)}, not a number") from None
    if not abs(result) <= LARGEST_SCORE:  # NaN too
        raise EnvironmentFailure(f"{what} is {result:g}, not a finite number")
    return result


def step(value: Any, where: str) -> Step:
    """Return ``value``, which ``where`` returned, with plain numbers."""
    if not isinstance(value, Step):
        raise EnvironmentFailure(f"{where} returned {short(value)}, not a Step")
    reward = None if value.reward is None else number(value.reward, f"the reward that {where} returned")
    score = None if value.score is None else number(value.score, f"the score that {where} returned")
    if score is not None and not value.done:
        raise EnvironmentFailure(f"{where} returned a score without done=True; rewards of turns are reward=…")
    if not value.done and value.observation is None:
        raise EnvironmentFailure(f"{where} returned neither an observation nor done=True")
    state = None if value.state is None else str(value.state)
    return Step(value.observation, reward, bool(value.done), score, info(value.info, where), state)


def messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return ``value``, a text of the user or messages in OpenAI's format, as messages."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, Sequence) or not all(isinstance(each, Mapping) for each in value):
        raise EnvironmentFailure(f"{where} returned {short(value)}, neither text nor a list of messages")
    for each in value:
        if not isinstance(each.get("role"), str) or not ("content" in each or "tool_calls" in each):
            raise EnvironmentFailure(f"{where} returned the message {short(each)} without a role or content")
    return [dict(each) for each in value]


def info(value: Any, where: str) -> dict[str, Any]:
    """Return ``value`` as JSON values of bounded size."""
    if not isinstance(value, Mapping):
        raise EnvironmentFailure(f"{where} returned {short(value)} as info, not a dict")
    try:
        text = json.dumps({str(key): each for key, each in value.items()}, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise EnvironmentFailure(
            f"{where} returned info that is not made of texts, finite numbers, lists and dicts: {error}"
        ) from None
    if len(text) > MAX_INFO_BYTES:
        raise EnvironmentFailure(f"{where} returned {len(text)} bytes of info, more than {MAX_INFO_BYTES}")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def short(value: Any) -> str:
    """Return ``value`` for a message."""
    try:
        text = repr(value)
    except Exception:  # the class of a user defines it
        text = "an object"
    return f"{text[:100]} ({type(value).__name__})"


def _plain(value: Any) -> Any:
    """Return a scalar or array of NumPy or torch as numbers."""
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    raise TypeError(f"{short(value)} is none of these")
