"""Entry points of this package. Imports neither torch nor transformers."""

from rlcore.plugins import Plugin

train_engine = Plugin(
    interface=1,
    config="rlcore_fsdp.settings:FSDPSettings",
    factory="rlcore_fsdp.engine:build",
    export="rlcore_fsdp.export:export",
    summary="PyTorch FSDP2 over Hugging Face models, on one process or many, CPU or CUDA",
)
