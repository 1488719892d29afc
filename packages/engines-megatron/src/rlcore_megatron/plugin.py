"""The plugin ``megatron``, which reserves the name: this version cannot build the engine yet."""

from __future__ import annotations

from typing import NoReturn

from rlcore.config import Config
from rlcore.engines.settings import TrainEngineSpec
from rlcore.errors import PluginError
from rlcore.plugins import Plugin


class Settings(Config):
    """No options yet."""


def build(spec: TrainEngineSpec) -> NoReturn:
    """Refuse with a `PluginError`."""
    raise PluginError(
        "the Megatron-core engine is not implemented in this version of rlcore-engines-megatron; "
        "use engine=fsdp (pip install 'rlcore[fsdp]')"
    )


train_engine = Plugin(
    interface=1,
    config="rlcore_megatron.plugin:Settings",
    factory="rlcore_megatron.plugin:build",
    summary="not implemented in this version; use fsdp",
)
