"""The entry point: what this package offers to rlcore. Imports neither ray nor torch."""

from rlcore.plugins import Plugin

executor = Plugin(
    interface=1,
    config="rlcore.config.registry:NoParams",
    factory="rlcore_ray.backend:RayBackend",
    summary="engines in Ray worker processes, on one machine or many",
)
