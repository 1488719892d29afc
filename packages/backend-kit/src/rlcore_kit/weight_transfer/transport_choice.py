"""Choose the fastest transport that works for all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rlcore_kit.weight_transfer.shared_memory import host_identity

Transport = Literal["gloo", "nccl", "shm", "ipc"]


@dataclass(frozen=True)
class WeightLocation:
    """The memory that holds the weights of a process.

    Attributes:
        host: identity of the host; equal for processes that can share memory.
        gpu: identity of the device, the same in every process; None on the CPU.
    """

    host: str
    gpu: str | None


def local_weight_location(device: torch.device) -> WeightLocation:
    """Return the location of weights that this process holds on ``device``."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    return WeightLocation(host_identity(), gpu)


def choose(sender: WeightLocation, receivers: Sequence[WeightLocation], delta: bool) -> Transport:
    """Return the fastest transport that works for the sender and all receivers.

    ``ipc`` requires that all share one GPU, ``nccl`` that each has a different one. Deltas are made and applied on the
    host, so ``shm`` or ``gloo`` transfers them in any case.
    """
    one_host = all(receiver.host == sender.host for receiver in receivers)
    gpus = [location.gpu for location in (sender, *receivers)]
    if None not in gpus and not delta:
        if len(set(gpus)) == 1 and one_host:
            return "ipc"
        if len(set(gpus)) == len(gpus):
            return "nccl"
    return "shm" if one_host else "gloo"
