"""Moving tensors out of device memory and back, while all references to them stay valid."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Offloaded:
    """Contents of storages that are kept in host memory while the storages themselves are empty.

    Megatron's parameters, gradients and optimizer states are views into shared buffers; emptying the storages beneath
    them keeps all these views as they are.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], keep: bool = True) -> None:
        """Empty the storages of ``tensors``; without ``keep`` they are zero after `restore`."""
        self._storages: dict[int, tuple[torch.UntypedStorage, int, torch.Tensor | None]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not storage.nbytes() or storage.data_ptr() in self._storages:
                continue
            copy = None
            if keep:
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                copy.copy_(_bytes(storage))
            self._storages[storage.data_ptr()] = (storage, storage.nbytes(), copy)
        for storage, _, _ in self._storages.values():
            storage.resize_(0)

    def restore(self) -> None:
        """Fill the storages with their contents again."""
        for storage, size, copy in self._storages.values():
            storage.resize_(size)
            _bytes(storage).copy_(copy) if copy is not None else _bytes(storage).zero_()
        self._storages = {}


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
