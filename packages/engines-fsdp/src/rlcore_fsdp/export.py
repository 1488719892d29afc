"""Export a checkpoint of any number of ranks in one process, without building an engine.

Weights are read from the rank files a few at a time, in float32, and rounded once. Only a model with adapters is in
host memory as a whole, in the precision in which the run held its frozen weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlcore.boundary import boundary
from rlcore.engines import ExportSpec
from rlcore.errors import EngineError
from rlcore_fsdp import checkpoint, lora
from rlcore_fsdp.attention import IMPLEMENTATION
from rlcore_fsdp.checkpoint import Manifest, row_range
from rlcore_fsdp.saving import base_model_sum, kept_weights
from rlcore_fsdp.settings import FSDPSettings
from rlcore_fsdp.weights import full_weights
from rlcore_fsdp.writing import write_others
from rlcore_kit.checkpoint import base_model, rank_files
from rlcore_kit.checkpoint.base_model import Lora, check_base_model
from rlcore_kit.model_folder.files import Origin
from rlcore_kit.model_folder.loading import empty_model, load_model, read_config
from rlcore_kit.model_folder.tensor_names import to_model_files
from rlcore_kit.model_folder.writing import ADAPTERS, write_model_folder

_CPU = torch.device("cpu")
_READ_BYTES = 1 << 30
"""Weights that are read together."""

Weights = Iterator[tuple[str, torch.Tensor]]


@torch.no_grad()
def export(spec: ExportSpec) -> None:
    """Write the model folder, or the folder of adapters, of ``spec`` from its checkpoint.

    Raises:
        EngineError: the model's own files are missing or damaged, or the folder cannot be written.
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    path, engine = spec.checkpoint, spec.engine
    if not isinstance(engine.options, FSDPSettings):
        raise EngineError(f"options of the fsdp engine are FSDPSettings, not {type(engine.options).__name__}")
    settings = engine.options.lora
    if spec.adapter and settings is None:
        raise EngineError("the run trained all weights, not adapters; export the complete weights")
    manifest = rank_files.read_manifest(path, Manifest)
    lora_here = None if settings is None else Lora(rank=settings.rank, alpha=settings.alpha)
    check_base_model(path, (manifest.lora, manifest.frozen), (lora_here, None))
    rank_files.check_files(path, manifest, 0, 1)
    origin = Origin.of(engine.model, engine.head)
    model = _model(spec, manifest)
    kept = dict(kept_weights(model))
    checkpoint.check_shapes(path, manifest, {f"weight/{name}": tensor for name, tensor in kept.items()})
    if settings is None:
        weights = _rounded(_saved(path, manifest, kept), origin)
    else:
        for name, tensor in _saved(path, manifest, kept):
            kept[name].copy_(tensor)
        weights = full_weights(model, lambda name: getattr(torch, origin.dtype_of(name)), _CPU)
    if spec.adapter:
        _write_adapter(spec, model)
        return
    stream = (part for name, tensor in weights for part in to_model_files(model, name, tensor).items())
    others = partial(_write_others, spec, model, origin)
    write_model_folder(stream, spec.folder, others, engine.model.export_file_mb << 20)


def _model(spec: ExportSpec, manifest: Manifest) -> PreTrainedModel:
    """Build the model: on the meta device, or with the frozen weights that its adapters belong to.

    Raises:
        CheckpointError: the frozen weights are not those of the run.
    """
    engine, options = spec.engine, spec.engine.options
    config = read_config(engine.model, engine.head, engine.new_head, engine.head_outputs)
    assert isinstance(options, FSDPSettings)
    if options.lora is None or manifest.frozen is None:
        return empty_model(engine.model, config, engine.head, torch.float32, IMPLEMENTATION)
    dtype = getattr(torch, manifest.frozen.dtype.removeprefix("torch."))
    model = load_model(engine.model, config, engine.head, dtype, engine.seed, IMPLEMENTATION, engine.new_head)
    lora.add_adapters(model, options.lora, engine.head, torch.float32, engine.seed)
    frozen = base_model.frozen(dtype, [base_model_sum(model)])
    check_base_model(spec.checkpoint, (manifest.lora, manifest.frozen), (manifest.lora, frozen))
    return model


def _saved(path: Path, manifest: Manifest, wanted: dict[str, torch.Tensor]) -> Weights:
    """Yield the saved weights with the names, shapes and precisions of ``wanted``, which may be meta tensors."""
    held: dict[str, torch.Tensor] = {}
    for name, tensor in wanted.items():
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > _READ_BYTES:
            yield from _read(path, manifest, held)
            held = {}
        held[name] = tensor
    yield from _read(path, manifest, held)


def _read(path: Path, manifest: Manifest, wanted: dict[str, torch.Tensor]) -> Weights:
    prefix = "weight/"
    found = checkpoint.read(path, manifest, {prefix + name: row_range(tensor, 0) for name, tensor in wanted.items()})
    return ((name.removeprefix(prefix), tensor) for name, tensor in found.items())


def _rounded(weights: Weights, origin: Origin) -> Weights:
    for name, tensor in weights:
        dtype = getattr(torch, origin.dtype_of(name)) if tensor.is_floating_point() else tensor.dtype
        yield name, tensor.to(dtype)


def _write_adapter(spec: ExportSpec, model: PreTrainedModel, folder: Path | None = None) -> None:
    """Write the adapters of ``model`` to ``folder`` (default: that of ``spec``)."""
    options, dtype = spec.engine.options, spec.engine.model.export_dtype
    assert isinstance(options, FSDPSettings)
    assert options.lora is not None
    folder = folder or spec.folder
    weights = lora.full_adapters(model)
    if dtype is not None:
        weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    with boundary(f"adapter folder {folder} could not be written", EngineError):
        lora.write_adapters(weights, model, options.lora, spec.engine.model.path, folder)


def _write_others(spec: ExportSpec, model: PreTrainedModel, origin: Origin, folder: Path, names: set[str]) -> None:
    assert isinstance(spec.engine.options, FSDPSettings)
    if spec.engine.options.lora is not None:
        _write_adapter(spec, model, folder / ADAPTERS)
    write_others(model, origin, folder)
