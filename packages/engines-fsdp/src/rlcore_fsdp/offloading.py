"""Moving parameters and optimizer states between the device and host memory."""

from __future__ import annotations

import torch
from torch import nn

from rlcore.engines.train import Part
from rlcore_kit.checkpoint.rank_files import MOMENTS

PARTS: tuple[Part, ...] = ("params", "optimizer")


class Offloading:
    """Keeps track of which parts of an engine are on its device.

    Args:
        enabled: False if nothing ever moves: on the CPU, and where FSDP itself moves offloaded parameters.
    """

    def __init__(
        self, root: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device, enabled: bool
    ) -> None:
        self._root = root
        self._optimizer = optimizer
        self._enabled = enabled
        self._device_of: dict[Part, torch.device] = dict.fromkeys(PARTS, device)

    def move(self, parts: tuple[Part, ...], device: torch.device) -> None:
        """Move ``parts`` (all, if empty) to ``device``; parts that are there stay."""
        moved = [part for part in parts or PARTS if self._enabled and self._device_of[part] != device]
        for part in moved:
            if part == "params":
                self._root.to(device)
            elif self._optimizer is not None:
                for state in self._optimizer.state.values():
                    for moment in MOMENTS:
                        state[moment] = state[moment].to(device)
            self._device_of[part] = device
        if moved and device.type == "cpu":
            torch.cuda.empty_cache()  # other roles on this GPU (rollout engines) need the memory
