"""The entry point of the plugin. Imports neither torch nor transformers."""

from rlcore.plugins import Plugin

rollout_engine = Plugin(
    interface=1,
    config="rlcore_inline.settings:InlineSettings",
    factory="rlcore_inline.engine:build",
    summary="generates with the training engine's weights, in its process",
)
