"""Control endpoints of SGLang's server (0.5.21)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.server_api import ServerAPI

MEMORY = ["kv_cache", "weights"]
"""Memory that `SGLangServerAPI.sleep` releases."""


class SGLangServerAPI(ServerAPI):
    """`ServerAPI` of SGLang.

    Args:
        pause_mode: what happens to unfinished requests in a pause; see `SGLangSettings.pause_mode`.
    """

    def __init__(self, connection: Connection, pause_mode: Literal["retract", "in_place", "abort"]) -> None:
        super().__init__(connection)
        self.pause_mode = pause_mode

    async def pause(self) -> None:
        """Stop decoding as ``pause_mode`` says."""
        await self._control("/pause_generation", "pause", {"mode": self.pause_mode})

    async def resume(self) -> None:
        """Continue after `pause`."""
        await self._control("/continue_generation", "resume", {})

    async def sleep(self) -> None:
        """Pause, and release memory; SGLang keeps it on the CPU.

        Requests are retracted whatever ``pause_mode`` says: the server ends if any runs when it releases memory.
        """
        await self._control("/pause_generation", "pause", {"mode": "retract"})
        await self._control("/release_memory_occupation", "release its memory", {"tags": MEMORY})

    async def wake(self) -> None:
        """Take memory again; the server stays paused."""
        await self._control("/resume_memory_occupation", "take its memory again", {"tags": MEMORY})

    async def abort(self, server_ids: Sequence[str]) -> None:
        """Abort requests."""
        await asyncio.gather(
            *(self._control("/abort_request", "abort a request", {"rid": server_id}) for server_id in server_ids)
        )

    def weight_label(self) -> str:
        """Return the label of the server's weights."""
        return str(self.connection.ask("GET", "/model_info", "report its weights' version")["weight_version"])

    def set_weight_label(self, label: str) -> None:
        """Label the server's weights."""
        body = {"new_version": label, "abort_all_requests": False}
        self.connection.ask("POST", "/update_weight_version", "label its weights", body=body)

    def reset_prefix_cache(self) -> None:
        """Discard cached prefixes, except in mode "in_place": it keeps the cache of unfinished requests, which cannot
        be flushed."""
        if self.pause_mode != "in_place":
            self.connection.ask("POST", "/flush_cache", "reset its prefix cache", plain=True)

    def reload_model(self, timeout_s: float) -> None:
        """Pause, and load the files again with which the server was started."""
        # /model_info names the folder that was read last, which may hold an update
        path = self.connection.ask("GET", "/server_info", "report its settings")["model_path"]
        self.connection.ask("POST", "/pause_generation", "pause", body={"mode": "retract"})
        body = {"model_path": path, "flush_cache": False}  # a flush that fails within the update ends SGLang 0.5.21
        what = f"load {path} again"
        self.connection.ask("POST", "/update_weights_from_disk", what, body=body, timeout_s=timeout_s)
        self.connection.ask("POST", "/flush_cache", "reset its prefix cache", plain=True)

    async def _control(self, path: str, what: str, body: Any) -> None:
        connection = self.connection
        await connection.request("POST", path, what, body=body, timeout_s=connection.timeout_s)
