"""Mixtures of experts of megatron-core 0.16.1 on the CPU: how tokens travel between experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Collective = Callable[..., torch.Tensor]


def patch_moe() -> None:
    """Let tokens travel between experts without CUDA; called once per process.

    Only on their way from a CUDA device does the dispatcher turn the numbers of tokens into numpy arrays, which
    ``all_to_all_single`` requires. It also gathers and scatters different numbers of tokens over the ranks that
    share an expert's matrices, which gloo refuses.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    collectives: Any = mappings
    collectives._gather_along_first_dim = _gathering(collectives._gather_along_first_dim)
    collectives._reduce_scatter_along_first_dim = _scattering(collectives._reduce_scatter_along_first_dim)


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gathering(equal: Collective) -> Collective:
    def gather(
        own: torch.Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return equal(own, group, sizes, use_global_buffer)
        parts = [own.new_empty((size, *own.shape[1:])) for size in sizes]
        parts[group.rank()] = own.contiguous()
        for rank, part in enumerate(parts):
            dist.broadcast(part, group=group, group_src=rank)
        return torch.cat(parts)

    return gather


def _scattering(equal: Collective) -> Collective:
    def scatter(
        terms: torch.Tensor,
        group: dist.ProcessGroup,
        sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return equal(terms, group, sizes, use_global_buffer)
        summed = terms.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        start = sum(sizes[: group.rank()])
        return summed[start : start + sizes[group.rank()]]

    return scatter
