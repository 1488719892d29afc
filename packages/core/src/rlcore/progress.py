"""How far a long call has come: engines and rewards report it, and what shows it to the user listens.

Reports stay in their process. Without a listener they cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int, int], None]
"""Takes what is worked on ("completions generated"), how many are done, and of how many."""

_listeners: list[Listener] = []


def report(what: str, done: int, total: int) -> None:
    """Tell the listeners of this process that ``done`` of ``total`` are done."""
    for listener in _listeners:
        listener(what, done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call ``listener`` with every report of this process while the block runs, in the thread that reports."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
