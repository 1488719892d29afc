"""Running ``vllm serve`` servers as a rollout engine. Imports neither vllm nor httpx before `build` is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlcore.engines.rollout import RolloutEngine
    from rlcore.engines.settings import RolloutSpec


def build(spec: RolloutSpec) -> RolloutEngine:
    """Build one `RolloutEngine` over the servers of ``spec.options.server``.

    Raises:
        EngineError: a server is unreachable, serves another model, or was started in a way that cannot serve training.
    """
    from rlcore_vllm.server import rollout

    return rollout.build(spec)
