"""A rollout engine over a model folder, outside of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlcore import plugins
from rlcore.engines import ModelSettings, RolloutEngine, RolloutSpec
from rlcore_recipes.rollouts.environment import closing_runners
from rlcore_recipes.settings import RolloutSettings


def rollout_engine(
    model: ModelSettings,
    rollout: RolloutSettings,
    longest: int,
    seed: int,
    engines: Mapping[str, Any] | None = None,
) -> RolloutEngine:
    """Build the engine that ``rollout`` names; it loads ``model`` itself.

    Args:
        longest: maximum tokens of a prompt and its completion.
        engines: the other engines of its process.
    """
    spec = RolloutSpec(model=model, options=rollout.options, max_model_len=longest, seed=seed)
    engine: RolloutEngine = plugins.get(rollout.plugin_group, rollout.engine).build(spec)
    return engine if rollout.environment is None else closing_runners(engine)
