"""`VLLMServerRollout`: a running ``vllm serve`` as a `RolloutEngine`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from rlcore.engines.rollout import Completion, RolloutEngine
from rlcore.engines.settings import RolloutSpec
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.serving.calls import Call
from rlcore_kit.serving.handshake import Handshake
from rlcore_kit.serving.replicas import Replicas
from rlcore_kit.serving.server_rollout import ServerRollout, open_connection
from rlcore_kit.serving.weight_labels import WeightLabels
from rlcore_kit.weight_transfer import TransferStats
from rlcore_vllm.server import wire_format
from rlcore_vllm.server.api import VLLMServerAPI
from rlcore_vllm.server.handshake import shake_hands
from rlcore_vllm.server.settings import ServerSettings
from rlcore_vllm.server.weights import ServerWeights
from rlcore_vllm.settings import VLLMSettings

logger = logging.getLogger(__name__)


def build(spec: RolloutSpec) -> RolloutEngine:
    """Connect to all servers of ``spec.options.server`` and return one engine over them.

    Raises:
        EngineError: a server is unreachable, serves another model, or cannot serve training.
    """
    settings = cast(VLLMSettings, spec.options).server
    if settings is None:
        raise EngineError("mode 'server' needs the section server with the servers' URLs")
    labels = WeightLabels()
    return Replicas(
        [partial(connect, url, spec, settings, labels) for url in settings.urls],
        names=[url.rstrip("/") for url in settings.urls],
        seed=spec.seed,
        start_together=True,
        timeout_s=settings.weights_timeout_s,
        rejoin_timeout_s=settings.rejoin_timeout_s,
    )


def connect(url: str, spec: RolloutSpec, settings: ServerSettings, labels: WeightLabels) -> VLLMServerRollout:
    """Connect to the server at ``url``.

    Args:
        labels: shared by all clients of one run.

    Raises:
        EngineError, WorkerError: see `rlcore_vllm.server.handshake.shake_hands`.
    """
    api = VLLMServerAPI(open_connection(url, settings, settings.api_key()))
    try:
        return VLLMServerRollout(api, shake_hands(api, spec, settings, labels), spec, settings, labels)
    except BaseException:
        api.connection.close()
        raise


class VLLMServerRollout(ServerRollout):
    """Generates on one vLLM server; see `ServerRollout` and `connect`."""

    def __init__(
        self,
        api: VLLMServerAPI,
        handshake: Handshake,
        spec: RolloutSpec,
        settings: ServerSettings,
        labels: WeightLabels,
    ) -> None:
        super().__init__(api, handshake, spec, settings, labels)
        self._weights = ServerWeights(api, settings, handshake.workers)
        self._priorities = True  # until the server refuses one

    @property
    def takes_adapters(self) -> bool:
        """True if updates bring LoRA adapters."""
        return cast(VLLMSettings, self._spec.options).enable_lora

    @property
    def transfer_stats(self) -> TransferStats | None:
        """Statistics of the last weight transfer; None before the first."""
        return self._weights.stats

    async def _complete(self, call: Call) -> Completion:
        await self._admit(call)
        answer = await self._with_timeout(call, self._request(call))
        return wire_format.completion(call.request, answer, self.url, self._labels)

    async def _request(self, call: Call) -> Any:
        try:
            return await self._post(call)
        except EngineError as error:
            if not (self._priorities and call.request.priority and "priority" in str(error)):
                raise
            self._priorities = False
            logger.warning("%s ignores priorities; start it with --scheduling-policy priority", self.url)
            return await self._post(call)

    async def _post(self, call: Call) -> Any:
        request, known = call.request, self._handshake
        max_tokens = self._spec.max_model_len - len(request.prompt)
        body = wire_format.body(
            request, call.server_id, known.model_name, max_tokens, known.end_tokens, self._priorities
        )
        what = f"complete request {request.request_id!r}"
        return await self._connection.request("POST", wire_format.PATH, what, body=body)

    def _prepare_update(self, buckets: Iterable[WeightBucket]) -> Iterable[WeightBucket]:
        self._weights.connect()
        return buckets

    def _send_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        self._weights.send(buckets, version)

    def close(self) -> None:
        """Disconnect; the server stays up, and aborts requests that it has for this client."""
        self._weights.close()
        super().close()
