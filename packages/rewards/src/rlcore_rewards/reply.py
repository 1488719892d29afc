"""Replies of workers: JSON, because the trainer must never unpickle data of a process that ran user code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rlcore.engines.reward import RewardResult, result_problem

MAX_BYTES = 1 << 20
"""Maximum size of a reply."""


HARMLESS = frozenset({"exception", "exit", "result", "ground_truth"})
"""Kinds of failure after which a worker continues."""

REPORTED = HARMLESS | {"memory", "startup"}
"""Kinds that a worker reports; the trainer observes the others from outside."""


class WorkerFailure(Exception):
    """A sample has no result: a ``kind`` to count, and a message to log.

    Attributes:
        killed: the worker was ended by SIGKILL, possibly not because of the sample.
    """

    def __init__(self, kind: str, message: str, killed: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.killed = killed


def encode_result(value: Any) -> bytes:
    """Return the reply for the return value of a reward function.

    Args:
        value: a number, a `RewardResult`, or a mapping with ``score``. Of a mapping, other finite numbers become
            extras, the text under ``answer`` or ``pred`` becomes the answer, and the rest is left out.

    Raises:
        WorkerFailure: of kind "result", for anything else.
    """
    extras: dict[str, float] = {}
    answer = None
    score = value
    if isinstance(value, RewardResult):
        score, answer = value.score, value.answer
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
    result = RewardResult(_finite(score), extras, answer)
    problem = result_problem(result)
    if problem is not None:
        raise WorkerFailure("result", f"the function returned {problem}")
    reply = json.dumps({"score": result.score, "extras": extras, "answer": answer}).encode()
    if len(reply) > MAX_BYTES:
        raise WorkerFailure("result", f"the function returned {len(reply)} bytes, more than {MAX_BYTES}")
    return reply


def encode_failure(kind: str, message: str) -> bytes:
    """Return the reply that reports a failure."""
    return json.dumps({"failure": kind, "message": message}).encode()


def decode(reply: bytes) -> RewardResult:
    """Return the result in a reply, checked again: user code in the worker may write to the pipe.

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
            result = RewardResult(_finite(fields["score"]), extras, None if answer is None else str(answer))
            problem = result_problem(result)
            if problem is None:
                return result
            failure = WorkerFailure("protocol", f"the worker sent {problem}")
    except Exception as error:
        failure = WorkerFailure("protocol", f"the worker sent a malformed reply ({type(error).__name__}: {error})")
    raise failure


def _finite(value: Any) -> float:
    """Return ``value`` as a finite float: Python's, NumPy's and torch's numbers, but no text."""
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
