"""Writing a Hugging Face model folder from a stream of whole tensors."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from rlcore.engines import WeightBucket
from rlcore.errors import EngineError
from rlcore_megatron.reading import INDEX, SINGLE

MAX_FILE_BYTES = 4 << 30
_GENERATION = "generation_config.json"


def write_model(
    buckets: Iterable[WeightBucket],
    hf_config: Any,
    source: Path,
    path: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the stream as a folder that transformers load; all ranks call it, rank 0 writes.

    Rank 0 holds one file's tensors at a time in host memory. Everything is written beside the folder first. A new
    folder appears in one piece; in an existing one ``config.json`` goes first and comes back last, so that a folder
    with a configuration is complete.

    Args:
        source: the folder that the model came from, whose settings for generation are taken over.

    Raises:
        EngineError: on every rank, if the folder could not be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    stream = iter(buckets)
    error = None
    if dist.get_rank() == 0:
        try:
            temporary.mkdir(parents=True)
            names, dtype = _write_weights(stream, temporary, max_file_bytes)
            _config(hf_config, names, dtype).save_pretrained(temporary)
            if (source / _GENERATION).is_file():
                shutil.copyfile(source / _GENERATION, temporary / _GENERATION)
            _put_in_place(temporary, path)
        except (OSError, SafetensorError) as problem:
            error = str(problem)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for _ in stream:  # the stream is everyone's work, to its end
        pass
    if dist.get_world_size() > 1:
        box = [error]
        dist.broadcast_object_list(box, 0)
        error = box[0]
    if error is not None:
        raise EngineError(f"model folder {path} could not be written: {error}")


def _write_weights(stream: Iterable[WeightBucket], folder: Path, max_file_bytes: int) -> tuple[set[str], torch.dtype]:
    """The files and their index, under the names that transformers give them; and what they hold."""
    files: list[dict[str, int]] = []  # bytes of the tensors in each
    held: dict[str, torch.Tensor] = {}
    size, dtype = 0, torch.float32

    def write() -> None:
        save_file(held, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for bucket in stream:
        for name, tensor in bucket.tensors:
            if held and size + tensor.nbytes > max_file_bytes:
                write()
                size = 0
            held[name] = tensor.cpu().contiguous()
            size, dtype = size + tensor.nbytes, tensor.dtype
    write()
    final = [SINGLE] if len(files) == 1 else [_file_name(number, len(files)) for number in range(len(files))]
    for number, name in enumerate(final):
        (folder / f"{number}.part").rename(folder / name)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(sum(sizes.values()) for sizes in files)},
            "weight_map": {name: file for file, sizes in zip(final, files) for name in sizes},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return {name for sizes in files for name in sizes}, dtype


def _file_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _config(hf_config: Any, names: set[str], dtype: torch.dtype) -> Any:
    """The configuration of what was written: its precision, and the class for its head."""
    config = copy.deepcopy(hf_config)
    config.dtype = str(dtype).removeprefix("torch.")
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if "score.weight" in names:
        config.num_labels = 1
        biased = "score.bias" in names
        classes = (
            MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES if biased else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        )
    config.architectures = [classes[config.model_type]]
    return config


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    (path / "config.json").unlink(missing_ok=True)
    for stale in path.glob("model*.safetensors*"):
        stale.unlink()
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(path / file.name)
