"""Which blocks of the model's global tensors this process's weights and optimizer states are.

Megatron describes every parameter by sharded tensors: blocks of a global tensor, whose names and offsets do not depend
on the layout. Its optimizers divide the states of a parameter, flattened, over data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory

from rlcore_megatron.modules import PackedGPT
from rlcore_megatron.optimizer import Optimization
from rlcore_megatron.parallel import Parallel


@dataclass(frozen=True)
class Block:
    """A block of a global tensor.

    Attributes:
        data: a view of this process's tensor, with leading dimensions of one where the global tensor has more.
        padded: the first dimension is padded to fit the layout, so that its global size is not comparable.
    """

    key: str
    data: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    padded: bool


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this process and its optimizer states.

    Attributes:
        parameter: the model's weights.
        description: how Megatron places the parameter in global tensors.
        start, stop: range of the flat parameter whose states this rank has.
        main: the weights of this range that the optimizer updates; None without an optimizer.
        owner: the optimizer that updates them.
        divided: whether the states are divided over ``copies``, even if this rank's share is empty.
        copies: the processes that hold the same parameter.
        writes: whether this is the tensor-parallel and pipeline rank that writes the parameter.
    """

    parameter: torch.nn.Parameter
    description: ShardedTensor | ShardedTensorFactory
    start: int
    stop: int
    main: torch.Tensor | None
    owner: Any
    divided: bool
    copies: dist.ProcessGroup
    writes: bool

    def blocks(self, tensor: torch.Tensor) -> list[Block]:
        """Return ``tensor``, which has the shape of the parameter, as views of blocks of the global tensors."""
        if isinstance(self.description, ShardedTensor):
            return [_block(replace(self.description, data=tensor, dtype=tensor.dtype))]
        described = replace(self.description, data=tensor)
        return [_block(part) for part in _described(described.build())]

    def described(self, tensor: torch.Tensor, prefix: str) -> ShardedBase:
        """Describe ``tensor``, which has the shape of the parameter, as Megatron does, for the rank that writes it."""
        replica: Any = self.description.replica_id
        first = tuple(0 for _ in replica) if isinstance(replica, tuple) else 0
        changes: dict[str, Any] = {"key": prefix + self.description.key, "data": tensor, "replica_id": first}
        if isinstance(self.description, ShardedTensor):
            changes["dtype"] = tensor.dtype
        return replace(self.description, **changes)

    def assembled(self, kind: str, target: int) -> torch.Tensor | None:
        """Assemble the full "weight" or moment on rank ``target`` of the copies; the other ranks get None.

        Collective among the copies. Weights are in fp32 if those of the optimizer are.
        """
        shard, divided = self.parameter.detach(), False
        if kind != "weight" or (self.main is not None and self.parameter.dtype != torch.float32):
            divided = self.divided
            if self.stop == self.start:
                shard = torch.empty(0, dtype=torch.float32, device=self.parameter.device)
            else:
                assert self.main is not None
                shard = self.main.detach() if kind == "weight" else self.owner.optimizer.state[self.main][kind]
        if divided and self.copies.size() > 1:
            assembled = torch.zeros(self.parameter.numel(), dtype=shard.dtype, device=shard.device)
            assembled[self.start : self.stop] = shard.view(-1)
            dist.reduce(assembled, group=self.copies, group_dst=target)
            shard = assembled
        return shard.view(self.parameter.shape) if self.copies.rank() == target else None


def local_parameters(
    modules: Sequence[PackedGPT], optimization: Optimization | None, parallel: Parallel
) -> list[LocalParameter]:
    """Return all parameters of this process, in an order that all copies share."""
    shards = dict(_optimizer_shards(optimization)) if optimization is not None else {}
    found = []
    for module in modules:
        parameters = {id(p): p for p in module.parameters()}
        for description in _described(module.sharded_state_dict()):
            parameter = parameters.pop(id(description.data), None)
            if parameter is None:
                continue
            start, stop, main, owner = shards.get(parameter, (0, parameter.numel(), None, None))
            copies = parallel.dp_cp_group if getattr(parameter, "allreduce", True) else parallel.expert_dp_group
            replica = description.replica_id
            first = not any(replica[:-1]) if isinstance(replica, tuple) else True  # shift allowed: ranks
            divided = hasattr(owner, "model_param_group_index_map")  # the distributed optimizer
            found.append(LocalParameter(parameter, description, start, stop, main, owner, divided, copies, first))
        assert not parameters, "Megatron describes every parameter"
    return found


def other_states(modules: Sequence[PackedGPT]) -> list[ShardedBase]:
    """Return the states besides parameters that Megatron's readers require (of TransformerEngine, often none)."""
    parameters = {id(p) for module in modules for p in module.parameters()}
    return [
        state
        for module in modules
        for state in _described(module.sharded_state_dict())
        if id(state.data) not in parameters
    ]


def adam_step(optimization: Optimization) -> float:
    """Return the number of steps that the optimizer has made."""
    for part in optimization.parts():
        for group in part.param_groups:
            for parameter in group["params"]:
                if step := part.optimizer.state.get(parameter, {}).get("step", group.get("step", 0)):
                    return float(step)
    return 0.0


def restore_moments(local: LocalParameter, moments: dict[str, torch.Tensor], step: float) -> None:
    """Replace this rank's optimizer states by the flat ``moments``; an empty mapping removes them."""
    optimizer = local.owner.optimizer
    optimizer.state.pop(local.main, None)
    own_step = isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).__module__.startswith("torch.")
    if not own_step:  # optimizers of TransformerEngine and apex count steps by group
        for group in optimizer.param_groups:
            group["step"] = int(step)
    if moments and local.main is not None and local.stop > local.start:
        state = {name: value.view(local.main.shape).to(local.main.device) for name, value in moments.items()}
        optimizer.state[local.main] = state | ({"step": torch.tensor(step)} if own_step else {})


def _optimizer_shards(
    optimization: Optimization,
) -> Iterator[tuple[torch.nn.Parameter, tuple[int, int, torch.Tensor | None, Any]]]:
    for part in optimization.parts():
        if hasattr(part, "model_param_group_index_map"):  # the distributed optimizer
            held = part.model_param_group_index_map
            for buffers in part.buffers:
                for parameter in buffers.params:  # this rank may have no element of some parameters
                    if parameter not in held:
                        yield parameter, (0, 0, torch.empty(0, device=parameter.device), part)
                        continue
                    group, index = held[parameter]
                    span = part._get_model_param_range_map(parameter)["param"]
                    yield parameter, (span.start, span.end, part.optimizer.param_groups[group]["params"][index], part)
            continue
        for main, parameter in _undivided(part):
            yield parameter, (0, parameter.numel(), main, part)


def _undivided(part: Any) -> Iterator[tuple[torch.Tensor, torch.nn.Parameter]]:
    """Yield the optimizer's weights and the model's, which are the same tensors in fp32."""
    if not hasattr(part, "float16_groups"):
        for parameter in part.get_parameters():
            yield parameter, parameter
        return
    for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups):
        yield from zip(mains, models)
    for parameters in part.fp32_from_fp32_groups:
        yield from zip(parameters, parameters)


def _described(tree: Any) -> Iterator[Any]:
    if isinstance(tree, ShardedBase):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _described(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _described(value)


def _block(tensor: ShardedTensor) -> Block:
    data = tensor.data.view(*[1] * tensor.prepend_axis_num, *tensor.data.shape)
    return Block(tensor.key, data, tensor.global_offset, tensor.global_shape, tensor.allow_shape_mismatch)
