"""Damaged and hostile input: every file that a command reads is mutated, every configuration key gets odd values.

A command may succeed or say in one error what is wrong. A traceback, a signal, a hang, or success where the input
cannot have been understood, is a failure. A deterministic choice of the cases runs by default, and all of them where
``FUZZ_CASES=all`` is set (``nox -s fuzz``).
"""

import hashlib
import os
from collections.abc import Iterable

ALL = os.environ.get("FUZZ_CASES") == "all"


def chosen(names: Iterable[str], count: int) -> list[str]:
    """All of ``names``, or the same ``count`` of them every time: a name's digest decides, not its position."""
    ordered = list(names)
    if ALL:
        return ordered
    picked = set(sorted(ordered, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
    return [name for name in ordered if name in picked]
