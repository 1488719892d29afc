"""The entry point: what this package offers to rlcore. Imports neither torch nor megatron."""

from rlcore.plugins import Plugin

train_engine = Plugin(
    interface=1,
    config="rlcore_megatron.settings:MegatronSettings",
    factory="rlcore_megatron.engine:build",
    export="rlcore_megatron.export:export",
    summary="Megatron-core: tensor, pipeline, context, expert and data parallelism, on CUDA (or slowly on the CPU)",
)
