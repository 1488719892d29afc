"""A copy of tensors in host memory, which a thread can write to disk while training changes the originals."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class HostCopy:
    """Buffers in host memory that are reused by the next copy; pinned if there are CUDA tensors."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy ``tensors`` into the buffers and return these; the copy is complete when this returns."""
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name in tensors}
        cuda = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=bool(cuda))
            buffer.copy_(tensor, non_blocking=True)
        for device in cuda:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._buffers)
