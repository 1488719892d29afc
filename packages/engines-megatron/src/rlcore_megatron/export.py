"""Export a checkpoint of any parallel layout in one process, without a GPU."""

from __future__ import annotations

from dataclasses import replace

from rlcore.engines import ExportSpec
from rlcore.errors import EngineError
from rlcore_kit.model_folder.files import Origin
from rlcore_megatron.engine import build
from rlcore_megatron.settings import MegatronSettings

_ALONE = MegatronSettings(device="cpu", implementation="local")


def export(spec: ExportSpec) -> None:
    """Write the model folder of ``spec`` from its checkpoint.

    Host memory holds the model twice. Weights are those that the optimizer updates, rounded once.

    Raises:
        EngineError: the model cannot be built or written, or adapters are asked for, which this engine does not train.
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    options = spec.engine.options
    if not isinstance(options, MegatronSettings):
        raise EngineError(f"options of the megatron engine are MegatronSettings, not {type(options).__name__}")
    if spec.adapter:
        raise EngineError("the megatron engine trains no adapters; export the complete weights")
    origin = Origin.of(spec.engine.model, spec.engine.head)
    narrow = origin.dtype == "bfloat16" and not origin.dtypes
    alone = _ALONE.model_copy(
        update={"transformer": options.transformer, "dtype": "bfloat16" if narrow else "float32"},
    )
    engine = build(replace(spec.engine, options=alone, optim=None))
    try:
        engine.load(spec.checkpoint)
        engine.save_pretrained(spec.folder)
    finally:
        engine.close()
