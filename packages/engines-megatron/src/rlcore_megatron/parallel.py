"""Sizes, ranks and process groups of the parallel layout, which all engines of a process share."""

from __future__ import annotations

import atexit
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rlcore.errors import EngineError
from rlcore_kit.training import process_group
from rlcore_megatron.settings import MegatronSettings


@dataclass(frozen=True)
class Parallel:
    """Sizes, ranks and process groups of every kind of parallelism.

    Attributes:
        tp: tensor parallel: columns or rows of every matrix, and of the vocabulary.
        pp: pipeline parallel: consecutive layers. ``vpp`` chunks of layers per stage (1: not interleaved).
        cp: context parallel: tokens of every sequence.
        ep: expert parallel: experts of a layer; their matrices are divided by ``etp``, not ``tp``.
        dp: data parallel: copies of the (dense part of the) model that work on different samples.
        world: all processes, ``tp · pp · cp · dp``.
    """

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int
    world: int
    rank: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    ep_rank: int
    etp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    etp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    expert_dp_group: dist.ProcessGroup

    @property
    def last_stage(self) -> bool:
        """Whether this process computes the outputs."""
        return self.pp_rank == self.pp - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the process that holds the last stage of this process's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp - 1)


# Megatron keeps one layout per process; it exists as long as an engine that was built on it.
_layout: tuple[int, tuple[int, ...]] | None = None
_users: weakref.WeakSet[Any] = weakref.WeakSet()


def join_processes(device: torch.device) -> int:
    """Join the process group that the environment of ``torchrun`` describes; return the number of processes.

    Megatron needs a process group in a single process too: it gets a group of one.
    """
    if not dist.is_initialized():
        atexit.register(_leave_processes)  # the interpreter aborts if threads of gloo outlive it
    world = process_group.join_processes(device)
    process_group.ensure_process_group(device)
    return world


def _leave_processes() -> None:
    if dist.is_initialized():
        parallel_state: Any = sys.modules.get("megatron.core.parallel_state")
        if parallel_state is not None and parallel_state.model_parallel_is_initialized():
            _undo_layout(parallel_state)
        dist.destroy_process_group()


def _undo_layout(parallel_state: Any) -> None:
    """Destroy Megatron's layout and its process groups, which megatron-core 0.16.1 forgets but does not destroy."""
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    for group in groups:
        dist.destroy_process_group(group)


def initialize(settings: MegatronSettings) -> Parallel:
    """Divide the processes of the default group according to ``settings``; collective.

    All engines of a process share one layout, which is in use until each one that called `hold` has called `release`.

    Raises:
        EngineError: another engine of this process is using another layout.
    """
    global _layout
    from megatron.core import parallel_state, tensor_parallel

    sizes = (
        settings.tensor_parallel,
        settings.pipeline_parallel,
        settings.virtual_pipeline,
        settings.context_parallel,
        settings.expert_parallel,
        settings.expert_tensor_parallel or settings.tensor_parallel,
    )
    wanted = dist.get_world_size(), sizes
    if parallel_state.model_parallel_is_initialized() and _layout != wanted:
        if _users:
            raise EngineError(
                "all megatron engines of a process must have the same layout: another one has tensor, pipeline, "
                f"virtual-pipeline, context, expert and expert-tensor sizes {_layout and _layout[1]}, this one "
                f"{sizes}"
            )
        _undo_layout(parallel_state)
    if not parallel_state.model_parallel_is_initialized():
        tp, pp, vpp, cp, ep, etp = sizes
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            create_gloo_process_groups=False,
        )
        # without dropout no number is drawn, but recomputation needs the tracker of random states
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
        _layout = wanted
    return _current(settings)


def hold(user: Any) -> None:
    """Keep the current layout until ``user`` is garbage-collected or passed to `release`."""
    _users.add(user)


def release(user: Any) -> None:
    """End the use of the layout by ``user``."""
    _users.discard(user)


def _current(settings: MegatronSettings) -> Parallel:
    from megatron.core import parallel_state as state

    return Parallel(
        tp=settings.tensor_parallel,
        pp=settings.pipeline_parallel,
        vpp=settings.virtual_pipeline,
        cp=settings.context_parallel,
        ep=settings.expert_parallel,
        etp=settings.expert_tensor_parallel or settings.tensor_parallel,
        dp=state.get_data_parallel_world_size(),
        world=dist.get_world_size(),
        rank=dist.get_rank(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        pp_rank=state.get_pipeline_model_parallel_rank(),
        cp_rank=state.get_context_parallel_rank(),
        ep_rank=state.get_expert_model_parallel_rank(),
        etp_rank=state.get_expert_tensor_parallel_rank(),
        dp_rank=state.get_data_parallel_rank(),
        tp_group=state.get_tensor_model_parallel_group(),
        pp_group=state.get_pipeline_model_parallel_group(),
        cp_group=state.get_context_parallel_group(),
        ep_group=state.get_expert_model_parallel_group(),
        etp_group=state.get_expert_tensor_parallel_group(),
        dp_group=state.get_data_parallel_group(),
        dp_cp_group=state.get_data_parallel_group(with_context_parallel=True),
        expert_dp_group=state.get_expert_data_parallel_group(),
    )
