"""Tensors as NumPy arrays and back, sharing memory: the way into Arrow files, pickles and Ray's object store."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

# What NumPy calls by the same name; every other dtype (bfloat16, the float8s) travels as its bits.
_IN_NUMPY = {
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
    "float16", "float32", "float64", "complex64", "complex128",
}  # fmt: skip
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of ``dtype`` without "torch."."""
    return str(dtype).removeprefix("torch.")


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the values of ``tensor``, or its bits as integers if NumPy lacks the dtype; a view if it is on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    if dtype_name(tensor.dtype) not in _IN_NUMPY:
        tensor = tensor.view(_BITS[tensor.dtype.itemsize])
    return tensor.numpy()


def from_numpy(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor from which `to_numpy` made ``array``, over the same memory."""
    with warnings.catch_warnings():
        # Arrow's and Ray's buffers are read-only and torch warns of that; batches are never written to.
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.from_numpy(array)
    return tensor.view(dtype)


class PickledTensor:
    """Pickles only what a tensor shows of its storage, out of band where the pickler can (protocol 5); it comes back
    as a plain tensor over the pickler's own buffer. torch would pickle the whole storage behind a slice."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        if self.tensor.device.type == "cpu":
            return from_numpy, (to_numpy(self.tensor), self.tensor.dtype)
        return torch.detach, (self.tensor.detach().clone(),)  # the storage of a clone holds its values only
