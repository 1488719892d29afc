"""The executor that core offers as a plugin. Imports neither torch nor an engine."""

from rlcore.plugins import Plugin

local = Plugin(
    interface=1,
    config="rlcore.config.registry:NoParams",
    factory="rlcore.controller.backend:LocalBackend",
    summary="engines in this process, or in every process that torchrun starts",
)
