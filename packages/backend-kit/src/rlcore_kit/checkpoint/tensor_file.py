"""Write safetensors files and compute their checksum in one pass, with one tensor at a time in host memory.

Source of the format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from rlcore.engines.train import FileRecord

_CHUNK = 4 << 20  # bytes that are hashed, then written: few enough to stay in the processor's cache
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write ``tensors`` (on any device) to ``file``, flush it to disk, and return its size and checksum.

    Raises:
        OSError: the file cannot be written.
    """
    # widest types first, as safetensors writes them, so that every tensor is aligned
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    digest, size = hashlib.sha256(), 0
    with file.open("wb", buffering=0) as target:
        for chunk in _chunks(ordered, metadata):
            digest.update(chunk)
            size += chunk.nbytes
            while chunk:  # an unbuffered write may be partial
                chunk = chunk[target.write(chunk) :]
        os.fsync(target.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def flush(path: Path) -> None:
    """Wait until the file, or the entries of the folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunks(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), _CHUNK):
            yield content[start : start + _CHUNK]
