"""Tensors in the form that SGLang's ``/update_weights_from_tensor`` takes: a pickle in base64.

The endpoint knows no other form. Pickles are written here alone, and none is ever read; the server reads them with an
unpickler that allows a few types (0.5.21), which is why the metadata, a class of SGLang's own, is a `SimpleNamespace`:
it may be read, and this process needs no sglang.
"""

from __future__ import annotations

import io
import pickle
from base64 import b64encode
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

FORMAT = "flattened_bucket"
"""The ``load_format`` that goes with it."""


def flattened(tensors: Sequence[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """All bytes, one tensor after the other, in one tensor on the same device."""
    return torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for _, tensor in tensors])


def serialized(tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
    """One flattened bucket.

    On a GPU it holds a handle by which the server's process, on the same GPU, opens this one's memory; the tensors must
    live until the server has answered. On the CPU it holds the bytes: SGLang's own serialiser would hand over a file
    descriptor there, which an unrelated process may not have, and trying to get it ends the server.
    """
    metadata, start = [], 0
    for name, tensor in tensors:
        end = start + tensor.nbytes
        metadata.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=tensor.nbytes
            )
        )
        start = end
    flat = flattened(tensors)
    return b64encode(_pickled({"flattened_tensor": flat, "metadata": metadata}, on_gpu=flat.is_cuda)).decode()


def _pickled(value: Any, *, on_gpu: bool) -> bytes:
    if not on_gpu:
        return pickle.dumps(value)
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing  # noqa: F401 - teaches ForkingPickler to write CUDA handles

    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(value)
    return buffer.getvalue()
