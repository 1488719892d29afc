"""Running ``vllm serve`` servers as a rollout engine: `rlcore_vllm.server.engine.build`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlcore.engines.rollout import RolloutEngine
    from rlcore.engines.settings import RolloutSpec
    from rlcore_vllm.server.settings import ServerSettings


def build(spec: RolloutSpec, settings: ServerSettings) -> RolloutEngine:
    """One `RolloutEngine` over the servers at ``settings.urls``; imports neither vllm nor httpx before it is called.

    Raises:
        EngineError: a server is not there, serves another model, or was started in a way that cannot serve training.
    """
    from rlcore_vllm.server.engine import build

    return build(spec, settings)
