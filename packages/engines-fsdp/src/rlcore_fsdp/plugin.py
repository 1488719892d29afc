"""The entry points: what this package offers to rlcore. Imports neither torch nor transformers."""

from rlcore.plugins import Plugin

train_engine = Plugin(
    interface=1,
    config="rlcore_fsdp.config:FSDPSettings",
    factory="rlcore_fsdp.engine:build",
    summary="PyTorch FSDP2 over Hugging Face models, on one process or many, CPU or CUDA",
)

rollout_engine = Plugin(
    interface=1,
    config="rlcore_fsdp.inline.config:InlineSettings",
    factory="rlcore_fsdp.inline.engine:build",
    summary="generates with the training engine's own weights, in its process",
)
