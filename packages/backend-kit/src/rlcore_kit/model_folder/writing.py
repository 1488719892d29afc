"""Write a Hugging Face model folder. Weights are written first, so that no later failure loses them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlcore.boundary import reason
from rlcore.errors import EngineError
from rlcore_kit.model_folder.files import ADAPTER, CONFIG, GENERATION, INDEX, SINGLE, Origin

MAX_FILE_BYTES = 4 << 30
ADAPTERS = "adapter"
"""Subfolder of a model folder with the adapters that are merged into the weights, in PEFT's format."""


def write_model_folder(
    weights: Iterable[tuple[str, torch.Tensor]],
    path: Path,
    write_others: Callable[[Path, set[str]], None],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write ``weights`` and the other files of a model to the folder ``path``, which may hold other files.

    All files are first written to a temporary folder in the same parent folder. A new folder appears atomically; in an
    existing folder ``config.json`` is removed first and moved in last, so that a folder with a configuration is
    complete. The tensors of one file at a time are in host memory.

    Args:
        weights: names and tensors, on any device.
        write_others: ``write_others(folder, names)`` writes ``config.json`` and further files to ``folder``; ``names``
            are those of the tensors.
        max_file_bytes: maximum size of a weight file, unless one tensor alone is larger.

    Raises:
        EngineError: there are no tensors, or files cannot be written. If only ``write_others`` failed, the weights are
            in ``path`` and the message says so.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            temporary.mkdir(parents=True)
            names = _write_weights(weights, temporary, max_file_bytes)
        except Exception as error:
            raise EngineError(f"model folder {path} could not be written: {reason(error)}") from error
        if not names:
            raise EngineError(f"model folder {path} was not written: the model has no weights to write")
        failure: Exception | None = None
        try:
            write_others(temporary, names)
        except Exception as error:
            failure = error
            (temporary / CONFIG).unlink(missing_ok=True)  # an incomplete folder has no configuration
        try:
            _put_in_place(temporary, path)
        except Exception as error:
            raise EngineError(f"model folder {path} could not be written: {reason(error)}") from error
        if failure is not None:
            raise EngineError(
                f"the weights are in {path}, but the other files of the model could not be written: {reason(failure)}; "
                f"copy {CONFIG} from the folder of the model that the run started from"
            ) from failure
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_on_first_rank(
    weights: Iterator[tuple[str, torch.Tensor]],
    path: Path,
    write_others: Callable[[Path, set[str]], None],
    rank: int,
    gather: Callable[[str | None], list[str | None]],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a stream of tensors that all ranks produce together, on rank 0, as `write_model_folder` does.

    Args:
        gather: all-gather: returns every rank's value, in rank order.

    Raises:
        EngineError: on every rank, if the folder could not be written.
    """
    error = None
    if rank == 0:
        try:
            write_model_folder(weights, path, write_others, max_file_bytes)
        except EngineError as problem:
            error = str(problem)
    for _ in weights:  # producing the stream is collective: every rank iterates to its end
        pass
    if error := gather(error)[0]:
        raise EngineError(error)


def write_configuration(config: Any, architecture: str, origin: Origin, folder: Path) -> None:
    """Write ``config.json``, and ``generation_config.json`` unchanged from the files that the model was loaded from.

    Args:
        config: configuration of transformers; its precision and class are set to those of the written model.
        architecture: class of transformers that loads the folder.
        origin: precision and generation settings of the original model.
    """
    config.dtype = origin.dtype
    config.architectures = [architecture]
    if origin.generation is not None:
        (folder / GENERATION).write_text(origin.generation, encoding="utf-8")
    config.to_json_file(folder / CONFIG)


def _write_weights(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, max_file_bytes: int) -> set[str]:
    """Write the weight files and their index, named as transformers names them; return the tensors' names."""
    files: list[dict[str, int]] = []  # bytes of the tensors in each
    held: dict[str, torch.Tensor] = {}
    size = 0

    def write() -> None:
        save_file(held, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in weights:
        if held and size + tensor.nbytes > max_file_bytes:
            write()
            size = 0
        held[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    if held:
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
    return {name for sizes in files for name in sizes}


def _file_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    (path / CONFIG).unlink(missing_ok=True)
    for stale in path.glob("model*.safetensors*"):
        stale.unlink()
    if (path / ADAPTERS / ADAPTER).is_file():  # adapters of the replaced weights
        shutil.rmtree(path / ADAPTERS)
    for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == CONFIG):
        entry.replace(path / entry.name)
