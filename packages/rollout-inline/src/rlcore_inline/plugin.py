"""The entry point: what this package offers to rlcore. Imports neither torch nor transformers."""

from rlcore.plugins import Plugin

rollout_engine = Plugin(
    interface=1,
    config="rlcore_inline.settings:InlineSettings",
    factory="rlcore_inline.engine:build",
    summary="generates with the training engine's own weights, in its process",
)
