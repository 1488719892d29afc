"""`ServerAPI`: the control endpoints that a client of an inference server needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from rlcore.errors import EngineError, WorkerError
from rlcore_kit.serving.connection import Connection


class ServerAPI(ABC):
    """Control endpoints of the server behind ``connection``.

    Coroutines run on the connection's thread. Other methods block, and may be called from any thread. All raise
    `EngineError` if the server refuses, and `WorkerError` if it fails or is gone; see `Connection`.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @abstractmethod
    async def pause(self) -> None:
        """Stop decoding; unfinished requests are kept."""

    @abstractmethod
    async def resume(self) -> None:
        """Continue after `pause`; does nothing if the server is not paused."""

    @abstractmethod
    async def sleep(self) -> None:
        """Pause, and release device memory."""

    @abstractmethod
    async def wake(self) -> None:
        """Take device memory again; the server stays paused."""

    @abstractmethod
    async def abort(self, server_ids: Sequence[str]) -> None:
        """Abort the requests that the server knows under ``server_ids``; unknown ids are ignored."""

    @abstractmethod
    def weight_label(self) -> str:
        """Return the label of the server's weights; see `weight_labels`."""

    @abstractmethod
    def set_weight_label(self, label: str) -> None:
        """Label the server's weights, and every token that is sampled from now on."""

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Discard cached prefixes, which older weights computed; the server is paused."""

    @abstractmethod
    def reload_model(self, timeout_s: float) -> None:
        """Pause, and load the files again with which the server was started."""

    async def check_health(self, timeout_s: float) -> None:
        """Raise `EngineError` or `WorkerError` unless the server reports within ``timeout_s`` that it is healthy."""
        await self.connection.request("GET", "/health", "report its health", timeout_s=timeout_s)

    async def diagnose(self, timeout_s: float) -> str:
        """Return why a request may have timed out, for its error message."""
        try:
            await self.check_health(timeout_s)
        except (EngineError, WorkerError) as error:
            return f"it hangs ({error})"
        return "its health endpoint answers, so its engine hangs or timeout_s is too short"
