"""Processes and devices: who we are, where we compute, and small sums over ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rlcore.errors import EngineError

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join_processes(device: torch.device) -> int:
    """The world size, after joining the process group that ``torchrun``'s environment describes (if it does)."""
    if not dist.is_initialized() and all(name in os.environ for name in _ENVIRONMENT):
        if int(os.environ["WORLD_SIZE"]) == 1:
            return 1
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return dist.get_world_size() if dist.is_initialized() else 1


def make_mesh(device: torch.device, replicate: int) -> DeviceMesh:
    """The FSDP mesh: ``(shard,)`` or, with several replicas, ``(replicate, shard)``.

    A single process gets a process group of one if it has none.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    if world % replicate:
        raise EngineError(f"replicate {replicate} does not divide the number of processes {world}")
    if replicate == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, world // replicate), mesh_dim_names=("replicate", "shard"))


def sum_over_ranks(values: Mapping[str, float], world: int) -> dict[str, float]:
    """Each value summed over all ranks; every rank gives the same keys."""
    if world == 1:
        return dict(values)
    names = sorted(values)
    total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist()))


def max_over_ranks(value: int, world: int) -> int:
    if world == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_objects(value: Any, world: int) -> list[Any]:
    """``value`` of every rank, by rank. Values are plain data made by us."""
    if world == 1:
        return [value]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, value)
    return gathered
