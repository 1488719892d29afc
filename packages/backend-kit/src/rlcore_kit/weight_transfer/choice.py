"""Which transport serves, from what the processes say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rlcore_kit.weight_transfer.shared_memory import host_identity

Transport = Literal["gloo", "nccl", "shm", "ipc"]


@dataclass(frozen=True)
class Facts:
    """Where a process keeps its weights.

    Attributes:
        host: the same for processes that can share memory.
        gpu: identity of the device, the same in every process; None on the CPU.
    """

    host: str
    gpu: str | None


def facts_here(device: torch.device) -> Facts:
    """This process's facts; ``device`` is that of the weights."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    return Facts(host_identity(), gpu)


def choose(sender: Facts, receivers: Sequence[Facts], delta: bool) -> Transport:
    """The fastest transport that serves all.

    ``ipc`` needs all on one GPU, ``nccl`` each on one of its own. Deltas are made and applied on the host, so they go
    by ``shm`` or ``gloo`` in any case.
    """
    one_host = all(receiver.host == sender.host for receiver in receivers)
    gpus = [facts.gpu for facts in (sender, *receivers)]
    if None not in gpus and not delta:
        if len(set(gpus)) == 1 and one_host:
            return "ipc"
        if len(set(gpus)) == len(gpus):
            return "nccl"
    return "shm" if one_host else "gloo"
