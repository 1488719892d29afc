"""`Backend`: the interface of a running vLLM engine, in this process or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from rlcore.errors import WorkerError

CLOSED = "the vLLM engine is closed"

Done = Callable[[Any], None]
"""Called once, from any thread, with vLLM's ``RequestOutput`` or an `Exception`."""


class Backend(Protocol):
    """One vLLM engine. Methods may be called from any thread except those of the backend.

    Methods that wait raise `EngineError` with vLLM's reason, or `WorkerError` if the engine is gone or a timeout
    expired.

    Attributes:
        config: vLLM's ``VllmConfig``.
        workers: number of worker processes that share the model.
        local: whether the only worker is in this process and takes tensors as arguments.
    """

    config: Any
    workers: int
    local: bool

    @property
    def failure(self) -> WorkerError | None:
        """Why the engine cannot be used any more, `WorkerDied` if it had a process; None while it can."""
        ...

    def submit(self, key: str, prompt: list[int], params: Any, priority: int, done: Done) -> None:
        """Queue a request under the unique ``key`` and return immediately."""
        ...

    def abort(self, keys: list[str]) -> None:
        """Abort requests; ``done`` gets their partial outputs with finish reason "abort". Unknown keys are ignored."""
        ...

    def pause(self) -> None:
        """Wait for the current step; no other begins until `resume`."""
        ...

    def resume(self) -> None:
        """Continue after `pause`."""
        ...

    def forget_prefixes(self, version: int | None) -> None:
        """Discard the KV cache, which requests compute again after `resume`, and label new tokens with ``version``.

        The engine must be paused.
        """
        ...

    def call_workers(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """Call ``method`` of every worker; return the results by rank."""
        ...

    def sleep(self, level: int) -> None:
        """Release memory; the engine must be paused."""
        ...

    def wake(self, tags: list[str] | None) -> None:
        """Take memory again: "weights", "kv_cache", or None for both."""
        ...

    def probe(self, timeout_s: float) -> None:
        """Return if the engine reacts between two steps; raise `WorkerError` if not within ``timeout_s``."""
        ...

    def close(self, *, kill: bool = False) -> None:
        """End threads and processes, without a graceful shutdown if ``kill``; idempotent."""
        ...


def called(method: str) -> str:
    """Return a description of ``method`` of the workers, for messages."""
    return f"{method.removeprefix('rlcore_')} (in its workers)"
