"""Control of servers without endpoints for it: pauses and aborts close streams, and this process keeps the label."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.server_api import ServerAPI
from rlcore_kit.serving.weight_labels import FRESH


class ClientControl(ServerAPI):
    """`ServerAPI` without endpoints.

    Attributes:
        streams: tasks that read the unfinished completions, by the id of the request. One that is interrupted is
            removed before it is cancelled.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.streams: dict[str, asyncio.Task[Any]] = {}
        self._label = FRESH

    async def pause(self) -> None:
        """Close all streams; servers drop a request whose client is gone."""
        await self.abort(list(self.streams))

    async def resume(self) -> None:
        """Do nothing: requests that were interrupted are sent again by their callers."""

    async def sleep(self) -> None:
        """Close all streams; the server keeps its memory."""
        await self.pause()

    async def wake(self) -> None:
        """Do nothing."""

    async def abort(self, server_ids: Sequence[str]) -> None:
        """Close the streams of requests."""
        closing = [task for name in server_ids if (task := self.streams.pop(name, None)) is not None]
        for task in closing:
            task.cancel()
        if closing:
            await asyncio.wait(closing)

    def weight_label(self) -> str:
        """Return the label that was set last."""
        return self._label

    def set_weight_label(self, label: str) -> None:
        """Remember the label."""
        self._label = label

    def reset_prefix_cache(self) -> None:
        """Do nothing: a reload resets it."""

    def reload_model(self, timeout_s: float) -> None:
        """Do nothing: the first weights come by a reload."""
