"""Export a checkpoint of any parallel layout in one process, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlcore.boundary import boundary
from rlcore.engines import ExportSpec
from rlcore.errors import EngineError
from rlcore_kit.checkpoint import rank_files
from rlcore_kit.model_folder.files import Origin
from rlcore_megatron.engine import build
from rlcore_megatron.settings import MegatronSettings

_ALONE = MegatronSettings(device="cpu", implementation="local")


def export(spec: ExportSpec) -> None:
    """Write the model folder of ``spec`` from its checkpoint.

    Host memory holds the model twice. Weights are those that the optimizer updates, rounded once.

    Raises:
        EngineError: the model cannot be built or written, or adapters are asked for and the run trained all weights.
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    options = spec.engine.options
    if not isinstance(options, MegatronSettings):
        raise EngineError(f"options of the megatron engine are MegatronSettings, not {type(options).__name__}")
    if spec.adapter and options.lora is None:
        raise EngineError("the run trained all weights, not adapters; export the complete weights")
    origin = Origin.of(spec.engine.model, spec.engine.head)
    dtype = "bfloat16" if origin.dtype == "bfloat16" and not origin.dtypes else "float32"
    if options.lora is not None:
        dtype = _frozen_dtype(spec.checkpoint) or dtype
    alone = _ALONE.model_copy(update={"transformer": options.transformer, "dtype": dtype, "lora": options.lora})
    engine = build(replace(spec.engine, options=alone, optim=None))
    try:
        engine.load(spec.checkpoint)
        if spec.adapter:
            with boundary(f"adapter folder {spec.folder} could not be written", EngineError):
                engine.adapter_files()(spec.folder)
        else:
            engine.save_pretrained(spec.folder)
    finally:
        engine.close()


def _frozen_dtype(checkpoint: Path) -> str | None:
    """Return the precision of the frozen weights under the adapters of ``checkpoint``; None if it holds all weights."""
    from rlcore_megatron import cpu_emulation

    cpu_emulation.install()  # before the next module imports megatron-core
    from rlcore_megatron.checkpoint import Manifest

    frozen = rank_files.read_manifest(checkpoint, Manifest).frozen
    return None if frozen is None else frozen.dtype.removeprefix("torch.")
