"""Tensors in the format of SGLang's ``/update_weights_from_tensor``: a pickle in base64.

The endpoint accepts no other format. Pickles are written in this module only, and none is ever read. The server reads
them with an unpickler that allows a few types (0.5.21), so the metadata is a `SimpleNamespace` instead of SGLang's
class: that type is allowed, and this process needs no sglang.
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
"""The ``load_format`` of the request."""


def flattened(tensors: Sequence[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """Return the bytes of all tensors, one after the other, as one uint8 tensor on the same device."""
    return torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for _, tensor in tensors])


def serialized(tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
    """Return one flattened bucket for a request.

    On a GPU it holds a handle by which the server's process, on the same GPU, opens this process's memory; the tensors
    must live until the server has answered. On the CPU it holds the bytes: SGLang's serialiser would pass a file
    descriptor, which an unrelated process cannot open, and the attempt ends the server.
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

    import torch.multiprocessing  # noqa: F401 - registers the serialisation of CUDA handles

    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(value)
    return buffer.getvalue()
