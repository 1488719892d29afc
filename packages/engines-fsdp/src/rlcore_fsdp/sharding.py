"""FSDP2: the mesh, which modules are sharded, how weights reach the shards, and gathering full weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rlcore.errors import EngineError
from rlcore_fsdp.packed_model import PackedModel
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.training.process_group import ensure_process_group


def make_mesh(device: torch.device, replicate: int) -> DeviceMesh:
    """Return the FSDP mesh: ``(shard,)`` or, with several replicas, ``(replicate, shard)``.

    A process without a process group gets a group of one.

    Raises:
        EngineError: ``replicate`` does not divide the number of processes.
    """
    ensure_process_group(device)
    world = dist.get_world_size()
    if world % replicate:
        raise EngineError(f"replicate {replicate} does not divide the number of processes {world}")
    if replicate == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, world // replicate), mesh_dim_names=("replicate", "shard"))


def shard(
    root: PackedModel, mesh: DeviceMesh, settings: FSDPSettings, param_dtype: torch.dtype, reduce_dtype: torch.dtype
) -> None:
    """Shard every decoder layer, and the remaining modules together with ``root``."""
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
    }
    if settings.offload_params:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for layer in decoder_layers(root.model):
        fully_shard(layer, reshard_after_forward=settings.reshard_after_forward, **options)
    # the head is the last module in forward and the first in backward: freeing it in between would gain nothing
    fully_shard(root, reshard_after_forward=False, **options)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks, sharded (FSDP2 replaces their classes by subclasses) or not."""
    classes = set(model._no_split_modules or ())
    return [module for module in model.modules() if classes & {base.__name__ for base in type(module).__mro__}]


def fill(
    root: PackedModel, source: PreTrainedModel | None, mesh: DeviceMesh, device: torch.device, home: torch.device
) -> None:
    """Fill the sharded meta parameters and the buffers of ``root`` from ``source``; collective.

    Parameters are sent one at a time, so that only rank 0 ever holds the full model, in host memory.

    Args:
        source: the full model on rank 0, None on the other ranks.
        device: device of the buffers.
        home: device of the parameters.
    """
    model = root.model
    weights = dict(source.named_parameters()) if source is not None else {}
    filled: dict[int, nn.Parameter] = {}
    state: dict[str, nn.Parameter] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in filled:  # a tied weight is sent once
            assert isinstance(parameter, DTensor)
            if weights:
                full = weights[names[id(parameter)]].detach().to(device, parameter.dtype)
            else:
                full = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            local = distribute_tensor(full, mesh, parameter.placements).to(home)
            filled[id(parameter)] = nn.Parameter(local, parameter.requires_grad)
        state[name] = filled[id(parameter)]
    model.load_state_dict(state, strict=False, assign=True)
    buffers = dict(source.named_buffers(remove_duplicate=False)) if source is not None else {}
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        value = buffers[name].to(device) if buffers else torch.empty_like(buffer, device=device)
        dist.broadcast(value, src=0)
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = value


def reshard(root: nn.Module) -> None:
    """Free gathered parameters; afterwards ``root.parameters()`` are shards."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unshard(root: nn.Module) -> None:
    """Gather all parameters; collective."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


@contextmanager
def gathered(root: PackedModel, settings: FSDPSettings) -> Iterator[None]:
    """Have every parameter gathered, in compute precision, on the device, while the context lasts."""
    assert isinstance(root, FSDPModule)
    # a layer that is called before its root initialises itself as a root; torch 2.13 has no public way to prevent it
    root._get_fsdp_state()._lazy_init()
    modules: list[Any] = [module for module in root.modules() if isinstance(module, FSDPModule)]
    unshard(root)
    root.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(settings.reshard_after_forward and module is not root, recurse=False)
            module.reshard()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor of a shard; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
