"""The plugin ``sglang``, which reserves the name: this version cannot build the engine yet."""

from __future__ import annotations

from typing import NoReturn

from rlcore.config import Config
from rlcore.engines.settings import RolloutSpec
from rlcore.errors import PluginError
from rlcore.plugins import Plugin


class Settings(Config):
    """No options yet."""


def build(spec: RolloutSpec) -> NoReturn:
    """Refuse with a `PluginError`."""
    raise PluginError(
        "the SGLang engine is not implemented in this version of rlcore-rollout-sglang; "
        "use engine=inline (pip install 'rlcore[fsdp]')"
    )


rollout_engine = Plugin(
    interface=1,
    config="rlcore_sglang.plugin:Settings",
    factory="rlcore_sglang.plugin:build",
    summary="not implemented in this version; use inline",
)
