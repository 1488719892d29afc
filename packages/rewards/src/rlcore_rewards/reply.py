"""Replies of workers, as JSON: the trainer must never unpickle data of a process that ran a user's code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rlcore.engines.reward import RewardResult, result_problem
from rlcore_kit.worker.process import WorkerFailure

MAX_BYTES = 1 << 20
"""Maximum size of a reply."""


HARMLESS = frozenset({"exception", "exit", "result", "ground_truth"})
"""Kinds of failure after which a worker can continue."""

REPORTED = HARMLESS | {"memory", "startup"}
"""Kinds of failure that a worker reports; the trainer detects the others."""


def encode_result(value: Any) -> bytes:
    """Encode what a reward function returned.

    Args:
        value: a number, a `RewardResult`, or a mapping with ``score``. Of a mapping, other finite numbers become
            extras, the text under ``answer`` or ``pred`` becomes the answer, and the rest is ignored.

    Raises:
        WorkerFailure: of kind "result", for any other value.
    """
    extras: dict[str, float] = {}
    answer = None
    score = value
    applicable = True
    if isinstance(value, RewardResult):
        score, answer, applicable = value.score, value.answer, value.applicable
        extras = {str(key): _finite(number) for key, number in value.extras.items()}
    elif isinstance(value, Mapping):
        if "score" not in value:
            raise WorkerFailure("result", f"the function returned a dict without 'score': {_short(list(value))}")
        score = value["score"]
        answer = next((value[key] for key in ("answer", "pred") if isinstance(value.get(key), str)), None)
        for key, number in value.items():
            if key != "score":
                try:
                    extras[str(key)] = _finite(number)
                except WorkerFailure:
                    continue
    result = RewardResult(_finite(score), extras, answer, applicable=applicable)
    problem = result_problem(result)
    if problem is not None:
        raise WorkerFailure("result", f"the function returned {problem}")
    reply = json.dumps({"score": result.score, "extras": extras, "answer": answer, "applicable": applicable}).encode()
    if len(reply) > MAX_BYTES:
        raise WorkerFailure("result", f"the function returned {len(reply)} bytes, more than the maximum of {MAX_BYTES}")
    return reply


def encode_failure(kind: str, message: str) -> bytes:
    """Encode a failure, from which `decode` makes a `WorkerFailure`."""
    return json.dumps({"failure": kind, "message": message}).encode()


def decode(reply: bytes) -> RewardResult:
    """Decode the result in a reply, and check it again: code in the worker may write to the pipe.

    Raises:
        WorkerFailure: the reply reports a failure, or is malformed (kind "protocol").
    """
    try:
        fields = json.loads(reply)
        if "failure" in fields:
            kind = fields["failure"]
            failure = WorkerFailure(kind if kind in REPORTED else "protocol", str(fields["message"]))
        else:
            extras = {key: _finite(number) for key, number in fields["extras"].items()}
            answer = fields["answer"]
            answer = None if answer is None else str(answer)
            result = RewardResult(_finite(fields["score"]), extras, answer, applicable=bool(fields["applicable"]))
            problem = result_problem(result)
            if problem is None:
                return result
            failure = WorkerFailure("protocol", f"the worker sent {problem}")
    except Exception as error:
        failure = WorkerFailure("protocol", f"the worker sent a malformed reply ({type(error).__name__}: {error})")
    raise failure


def _finite(value: Any) -> float:
    """Convert ``value`` to a finite float: a number of Python, NumPy or torch, but no text."""
    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise WorkerFailure("result", f"the function returned {_short(value)}, not a number") from None
    if not math.isfinite(number):
        raise WorkerFailure("result", f"the function returned {number}, not a finite number")
    return number


def _short(value: Any) -> str:
    return f"{repr(value)[:100]} ({type(value).__name__})"
