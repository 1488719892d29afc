"""Writing a Hugging Face model folder from a stream of full tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from rlcore.engines import LoRASettings, WeightBucket
from rlcore_kit.model_folder.adapters import PREFIX, write_adapters
from rlcore_kit.model_folder.files import Origin
from rlcore_kit.model_folder.writing import ADAPTERS, MAX_FILE_BYTES, write_configuration, write_on_first_rank
from rlcore_kit.training.process_group import gather_objects


def write_model(
    buckets: Iterable[WeightBucket],
    hf_config: Any,
    origin: Origin,
    path: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
    adapters: Callable[[Path], None] | None = None,
) -> None:
    """Write the stream as a folder that transformers load; all ranks call it, rank 0 writes.

    Args:
        adapters: writes adapters to the new folder that it is given, which is in the model's folder.

    Raises:
        EngineError: on every rank, if the folder could not be written.
    """
    others = partial(_write_others, hf_config, origin, adapters)
    write_on_first_rank(_tensors(buckets, origin), path, others, dist.get_rank(), gather_objects, max_file_bytes)


def _tensors(buckets: Iterable[WeightBucket], origin: Origin) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket in buckets:
        for name, tensor in bucket.tensors:
            yield name, tensor.to(getattr(torch, origin.dtype_of(name)))


def _write_others(
    hf_config: Any, origin: Origin, adapters: Callable[[Path], None] | None, folder: Path, names: set[str]
) -> None:
    if adapters is not None:
        adapters(folder / ADAPTERS)
    config = copy.deepcopy(hf_config)
    write_configuration(config, model_class(config, names), origin, folder)


def adapter_writer(
    buckets: Iterable[WeightBucket], hf_config: Any, settings: LoRASettings, targets: Sequence[str], base: str
) -> Callable[[Path], None]:
    """Return what writes adapters, and a scalar head, to a new folder in PEFT's format.

    Args:
        buckets: see `rlcore_megatron.weights.export`.
        targets: last parts of the names of the adapted layers.
        base: folder or name of the model that the adapters belong to.
    """
    tensors = {
        name if name.startswith(PREFIX) else PREFIX + name: tensor.detach().to("cpu", copy=True)
        for bucket in buckets
        for name, tensor in bucket.tensors
    }
    name = model_class(hf_config, tensors)
    return lambda folder: write_adapters(tensors, settings, targets, folder, base=base, model_class=name)


def model_class(hf_config: Any, names: Collection[str]) -> str:
    """Return the name of transformers' class for a model whose files hold the tensors ``names``, with any prefix."""
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if any(name.endswith("score.weight") for name in names):
        biased = any(name.endswith("score.bias") for name in names)
        classes = (
            MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES if biased else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        )
    return str(classes[hf_config.model_type])
