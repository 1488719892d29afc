"""Writing a Hugging Face model folder from a stream of full tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from rlcore.engines import WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.model_folder.files import CONFIG, GENERATION, Origin
from rlcore_kit.model_folder.writing import MAX_FILE_BYTES, write_model_folder


def write_model(
    buckets: Iterable[WeightBucket],
    hf_config: Any,
    origin: Origin,
    path: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the stream as a folder that transformers load; all ranks call it, rank 0 writes.

    Raises:
        EngineError: on every rank, if the folder could not be written.
    """
    stream = _tensors(buckets, origin)
    error = None
    if dist.get_rank() == 0:
        try:
            write_model_folder(
                stream, path, lambda folder, names: _write_others(hf_config, origin, folder, names), max_file_bytes
            )
        except EngineError as problem:
            error = str(problem)
    for _ in stream:  # the stream is everyone's work, to its end
        pass
    if dist.get_world_size() > 1:
        box = [error]
        dist.broadcast_object_list(box, 0)
        error = box[0]
    if error is not None:
        raise EngineError(error)


def _tensors(buckets: Iterable[WeightBucket], origin: Origin) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket in buckets:
        for name, tensor in bucket.tensors:
            yield name, tensor.to(getattr(torch, origin.dtype_of(name)))


def _write_others(hf_config: Any, origin: Origin, folder: Path, names: set[str]) -> None:
    if origin.generation is not None:
        (folder / GENERATION).write_text(origin.generation, encoding="utf-8")
    _config(hf_config, names, origin.dtype).to_json_file(folder / CONFIG)


def _config(hf_config: Any, names: set[str], dtype: str) -> Any:
    """Return the configuration of the written model: its precision, and the class for its head."""
    config = copy.deepcopy(hf_config)
    config.dtype = dtype
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if "score.weight" in names:
        config.num_labels = 1
        biased = "score.bias" in names
        classes = (
            MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES if biased else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        )
    config.architectures = [classes[config.model_type]]
    return config
