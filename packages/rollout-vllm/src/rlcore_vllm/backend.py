"""What `VLLMRollout` needs of a running vLLM, in this process or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from rlcore.errors import WorkerError

CLOSED = "the vLLM engine is closed"

Done = Callable[[Any], None]
"""Called once, from any thread, with vLLM's ``RequestOutput`` or an `Exception`."""


class Backend(Protocol):
    """One vLLM engine. Methods may be called from any thread, but from none of the backend's own.

    Whatever waits raises `EngineError` with vLLM's reason, or `WorkerError`: the engine is gone, or did it not in time.

    Attributes:
        config: vLLM's own ``VllmConfig``.
        workers: how many worker processes compute together.
        local: its single worker is in this process and takes tensors as arguments.
        failure: why the engine is of no use any more, `WorkerDied` if it had a process; None while it is of use.
    """

    config: Any
    workers: int
    local: bool

    @property
    def failure(self) -> WorkerError | None: ...

    def submit(self, key: str, prompt: list[int], params: Any, priority: int, done: Done) -> None:
        """Queue a request under ``key``, which no other has had; waits for nothing."""
        ...

    def abort(self, keys: list[str]) -> None:
        """End requests; ``done`` gets what each has, with finish reason "abort". Unknown keys are ignored."""
        ...

    def pause(self) -> None:
        """Return when no step is under way; none begins until `resume`."""
        ...

    def resume(self) -> None: ...

    def forget_prefixes(self, version: int | None) -> None:
        """While paused: recompute the KV cache of all requests when they go on; label tokens with ``version``."""
        ...

    def call_workers(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """Call ``method`` of every worker; the results by rank."""
        ...

    def sleep(self, level: int) -> None:
        """While paused: give memory back."""
        ...

    def wake(self, tags: list[str] | None) -> None:
        """Take memory again: "weights", "kv_cache", or None for both."""
        ...

    def probe(self, timeout_s: float) -> None:
        """Return if the engine reacts between two steps; raise `WorkerError` if not within ``timeout_s``."""
        ...

    def close(self, *, kill: bool = False) -> None:
        """End threads and processes, at once and without asking them if ``kill``; idempotent."""
        ...


def called(method: str) -> str:
    """What workers do in ``method``, for messages."""
    return f"{method.removeprefix('rlcore_')} (in its workers)"
