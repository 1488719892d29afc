"""Control endpoints of ``vllm serve`` (0.32, with VLLM_SERVER_DEV_MODE=1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlcore_kit.serving.server_api import ServerAPI
from rlcore_vllm.server.wire_format import ID_PREFIX

_KEEP = {"mode": "keep"}


class VLLMServerAPI(ServerAPI):
    """`ServerAPI` of vLLM."""

    async def pause(self) -> None:
        """Stop decoding; unfinished requests are kept."""
        await self._control("/pause", "pause", params=_KEEP)

    async def resume(self) -> None:
        """Continue after `pause`."""
        await self._control("/resume", "resume")

    async def sleep(self) -> None:
        """Pause, and move the weights to host memory; vLLM ignores this on the CPU."""
        await self._control("/sleep", "sleep", params={"level": "1", **_KEEP})

    async def wake(self) -> None:
        """Take device memory again; the server, which waking resumes, is paused."""
        await self._control("/wake_up", "wake up")
        await self.pause()

    async def abort(self, server_ids: Sequence[str]) -> None:
        """Abort requests; an empty list would mean all, and is not sent."""
        if server_ids:
            ids = [ID_PREFIX + server_id for server_id in server_ids]
            await self._control("/abort_requests", "abort requests", body={"request_ids": ids})

    def weight_label(self) -> str:
        """Return the label of the server's weights."""
        return str(self.connection.ask("GET", "/weight_info", "report its weights' version")["weight_version"])

    def set_weight_label(self, label: str) -> None:
        """Label the server's weights."""
        self.connection.ask("POST", "/update_weight_version", "label its weights", body={"new_version": label})

    def reset_prefix_cache(self) -> None:
        """Discard cached prefixes; unfinished requests are prefilled again."""
        params = {"reset_running_requests": "true"}
        self.connection.ask("POST", "/reset_prefix_cache", "reset its prefix cache", params=params)

    def reload_model(self, timeout_s: float) -> None:
        """Pause, and load the files again with which the server was started."""
        self.connection.wait_for(self.pause(), "pause")
        self.call_workers("rlcore_restore", what="load its model's files again", timeout_s=timeout_s)
        self.reset_prefix_cache()

    def load_adapter(self, name: str, folder: str) -> None:
        """Load the adapter in ``folder``, which the server sees, as ``name``."""
        body = {"lora_name": name, "lora_path": folder}
        self.connection.ask("POST", "/v1/load_lora_adapter", "load an adapter", body=body, plain=True)

    def call_workers(self, method: str, *args: Any, what: str, timeout_s: float | None = None) -> list[Any]:
        """Call ``method`` of every worker with plain data; return the results, numbers among them as strings."""
        body = {"method": method, "args": list(args)}
        answer = self.connection.ask("POST", "/collective_rpc", what, body=body, timeout_s=timeout_s)
        return list((answer or {}).get("results", ()))

    async def _control(self, path: str, what: str, *, params: dict[str, str] | None = None, body: Any = None) -> None:
        connection = self.connection
        await connection.request("POST", path, what, params=params, body=body, timeout_s=connection.timeout_s)
