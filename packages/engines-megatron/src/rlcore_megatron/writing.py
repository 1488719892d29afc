"""Writing a Hugging Face model folder from a stream of full tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
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

from rlcore.engines import WeightBucket
from rlcore_kit.model_folder.files import Origin
from rlcore_kit.model_folder.writing import MAX_FILE_BYTES, write_configuration, write_on_first_rank
from rlcore_kit.training.process_group import gather_objects


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
    others = partial(_write_others, hf_config, origin)
    write_on_first_rank(_tensors(buckets, origin), path, others, dist.get_rank(), gather_objects, max_file_bytes)


def _tensors(buckets: Iterable[WeightBucket], origin: Origin) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket in buckets:
        for name, tensor in bucket.tensors:
            yield name, tensor.to(getattr(torch, origin.dtype_of(name)))


def _write_others(hf_config: Any, origin: Origin, folder: Path, names: set[str]) -> None:
    config = copy.deepcopy(hf_config)
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if "score.weight" in names:
        config.num_labels = 1
        biased = "score.bias" in names
        classes = (
            MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES if biased else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        )
    write_configuration(config, classes[config.model_type], origin, folder)
