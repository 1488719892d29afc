"""Megatron's data parallelism and AdamW around the model's chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from rlcore.engines import OptimSettings
from rlcore.errors import EngineError
from rlcore_kit.training.lr_schedule import check_schedule
from rlcore_megatron.modules import PackedGPT
from rlcore_megatron.settings import MegatronSettings


class Optimization:
    """Megatron's optimizer and the gradient buffers of the model.

    Attributes:
        chunks: chunks of the model, wrapped so that gradients accumulate in buffers that are summed over ranks.
        optimizer: Megatron's optimizer, or a chain of one for dense weights and one for experts.
    """

    def __init__(self, modules: Sequence[PackedGPT], settings: MegatronSettings, optim: OptimSettings) -> None:
        check_schedule(optim)
        self._optim = optim
        config = modules[0].config
        try:
            ddp = DistributedDataParallelConfig(
                **{"grad_reduce_in_fp32": True, **settings.ddp},
                use_distributed_optimizer=settings.distributed_optimizer,
            )
            self.chunks = [
                DistributedDataParallel(config, ddp, module, disable_bucketing=number > 0)
                for number, module in enumerate(modules)
            ]
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    **settings.optimizer,
                    optimizer="adam",
                    lr=optim.lr,
                    min_lr=0.0,
                    weight_decay=optim.weight_decay,
                    adam_beta1=optim.betas[0],
                    adam_beta2=optim.betas[1],
                    adam_eps=optim.eps,
                    clip_grad=0.0,  # `step` clips, once it knows that the norm is finite
                    bf16=config.bf16,
                    params_dtype=config.params_dtype,
                    use_distributed_optimizer=settings.distributed_optimizer,
                ),
                self.chunks,
                use_gloo_process_groups=False,
            )
        except (ValueError, AssertionError, TypeError) as error:
            raise EngineError(f"megatron-core rejects megatron.optimizer or megatron.ddp: {error}") from error
        config.finalize_model_grads_func = _sum_gradients
        if ddp.overlap_grad_reduce:
            syncs = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Set the gradients of all backward passes so far to zero."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Return the norm of all gradients, which are complete; the same on all ranks."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    @torch.no_grad()
    def step(self, norm: float, lr: float) -> None:
        """Clip the gradients, whose norm is ``norm``, and update the weights with the learning rate ``lr``."""
        for optimizer in self.parts():
            if self._optim.clip_grad is not None:
                clip_grad_by_total_norm_fp32(
                    optimizer.get_parameters(),
                    self._optim.clip_grad,
                    norm,
                    optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_mult"]
                group["weight_decay"] = self._optim.weight_decay * group["wd_mult"]  # 0 for biases and norms
        self.optimizer.step_with_ready_grads()

    def parts(self) -> list[Any]:
        """Return Megatron's optimizers that have parameters on this rank."""
        every = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [optimizer for optimizer in every if not getattr(optimizer, "is_stub_optimizer", False)]

    def gradient_buffers(self) -> Iterator[torch.Tensor]:
        """Yield the buffers that hold the gradients."""
        for chunk in self.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data

    def states(self) -> Iterator[torch.Tensor]:
        """Yield the moments, and the fp32 weights where those of the model are not fp32."""
        model = {id(p) for chunk in self.chunks for p in chunk.parameters()}
        storages = {p.untyped_storage().data_ptr() for chunk in self.chunks for p in chunk.parameters()}
        for part in self.parts():
            for parameter in part.get_parameters():
                if id(parameter) not in model and parameter.untyped_storage().data_ptr() not in storages:
                    yield parameter.data
                yield from (state for state in part.optimizer.state[parameter].values() if state.dim())


def _sum_gradients(chunks: Sequence[Any], num_tokens: Any, **kwargs: Any) -> None:
    """Sum gradients over ranks as Megatron does, but do not divide by tokens: the objective has normalised its loss."""
    finalize_model_grads(chunks, None, **kwargs)
