"""The processes of a training engine: joining them, and exchanging small values between them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join_processes(device: torch.device) -> int:
    """Join the process group that the environment of ``torchrun`` describes, if any; return the number of processes.

    A process that is alone gets no process group; see `ensure_process_group`.
    """
    described = all(name in os.environ for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1
    if described and not dist.is_initialized():
        dist.init_process_group(_backend(device))
    return dist.get_world_size() if dist.is_initialized() else 1


def ensure_process_group(device: torch.device) -> None:
    """Create a process group of one for a process that is alone, where a library needs a process group."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def number_of_ranks(process_group: dist.ProcessGroup | None = None) -> int:
    """Return the size of ``process_group`` (default: all processes); 1 for a process without one."""
    return dist.get_world_size(process_group) if dist.is_initialized() else 1


def own_rank() -> int:
    """Return the rank of this process among all; 0 for a process without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_objects(value: T) -> list[T]:
    """Return the ``value`` of every rank, in rank order; collective. Values are plain data of the engine."""
    if number_of_ranks() == 1:
        return [value]
    gathered: list[T] = [value] * number_of_ranks()
    dist.all_gather_object(gathered, value)
    return gathered


def sum_over_ranks(
    values: Mapping[str, float], device: torch.device, process_group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Sum each value over the ranks in fp64 on ``device``; every rank passes the same keys. Collective."""
    if number_of_ranks(process_group) == 1:
        return dict(values)
    names = sorted(values)
    total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=process_group)
    return dict(zip(names, total.tolist()))


def max_over_ranks(value: int, device: torch.device, process_group: dist.ProcessGroup | None = None) -> int:
    """Return the largest ``value`` of any rank, computed on ``device``; collective."""
    if number_of_ranks(process_group) == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=process_group)
    return int(largest)
