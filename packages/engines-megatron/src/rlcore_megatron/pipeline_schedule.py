"""Micro-batches through Megatron's pipeline schedules: one stage, 1F1B, or interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from rlcore.batch import Batch, to_column
from rlcore.engines import ForwardRequest, Objective
from rlcore.engines.settings import Head
from rlcore.errors import EngineError
from rlcore.metrics import Metrics
from rlcore_megatron.output_columns import OutputSizes, output_widths, separated
from rlcore_megatron.packing import PackedRow, pack
from rlcore_megatron.parallel import Parallel


class Pipeline:
    """Runs this process's chunks of the model in Megatron's pipeline schedule.

    Args:
        chunks: instances of `PackedGPT`, or these wrapped for data parallelism.
        sizes: of the model's outputs.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        head: Head,
        parallel: Parallel,
        sequence_parallel: bool,
        device: torch.device,
        sizes: OutputSizes,
    ) -> None:
        self._chunks = list(chunks)
        self._head = head
        self._parallel = parallel
        self._sequence_parallel = sequence_parallel
        self._device = device
        self._sizes = sizes

    def outputs(self, micro_batches: Sequence[Batch], request: ForwardRequest) -> list[torch.Tensor]:
        """Compute the outputs ``[T, width]`` of every micro-batch: on the last stage's device, none on other stages.

        `rlcore_megatron.output_columns` separates them.

        Args:
            micro_batches: on the CPU; the same number on all ranks, some may be empty.
        """

        def collect(row: PackedRow, outputs: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            return self._column(row, outputs)

        return self._run(micro_batches, request, lambda micro, row: partial(collect, row), forward_only=True)

    def gradients(
        self, micro_batches: Sequence[Batch], objective: Objective, denominators: dict[str, float]
    ) -> tuple[Metrics, Exception | None]:
        """Add the gradients of the objective to the buffers, and sum them over ranks.

        Returns:
            the objective's metrics on the last stage, empty ones on the others; and the first error of the objective,
            after which the gradients are invalid. It is not raised here because the other stages wait for this one.
        """
        request = objective.request
        metrics: list[Metrics] = []
        errors: list[Exception] = []
        nothing = torch.zeros((), dtype=torch.int, device=self._device)

        def loss(micro: Batch, row: PackedRow, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
            if len(micro) and not errors:
                try:
                    widths = output_widths(request, row.inputs, self._sizes)
                    columns = separated(self._column(row, outputs), widths)
                    value, measured = objective.loss(columns, micro.to(self._device), denominators)
                    metrics.append(measured)
                    return value, nothing, None
                except Exception as error:
                    errors.append(error)
            return outputs.sum() * 0.0, nothing, None

        self._run(micro_batches, request, lambda micro, row: partial(loss, micro, row), forward_only=False)
        return Metrics.merge(metrics), errors[0] if errors else None

    def _run(
        self,
        micro_batches: Sequence[Batch],
        request: ForwardRequest,
        loss: Callable[[Batch, PackedRow], Callable[..., Any]],
        *,
        forward_only: bool,
    ) -> list[Any]:
        def step(iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            micro = next(iterator)
            row = pack(micro, self._head, self._parallel, self._sequence_parallel, self._device, request)
            return model(row, request), loss(micro, row)

        several = len(self._chunks) > 1
        iterators = [iter(micro_batches) for _ in self._chunks]
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if several else iterators[0],
            model=self._chunks if several else self._chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=1,  # shapes travel with the tensors
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results

    def _column(self, row: PackedRow, outputs: torch.Tensor) -> torch.Tensor:
        """Return outputs ``[P, width]`` of the row as a column ``[T, width]``."""
        full = to_column(outputs, row.columns, row.total)
        if self._parallel.cp > 1:  # every rank has the outputs of its tokens
            full = reduce_from_tensor_model_parallel_region(full, group=self._parallel.cp_group)
        return full

    def agreed(self, metrics: Metrics, error: Exception | None) -> Metrics:
        """Return the last stage's metrics on all stages, or raise on all ranks if the objective failed on one."""
        if self._parallel.pp > 1:
            box: list[Any] = [(metrics, error and f"{type(error).__name__}: {error}")]
            dist.broadcast_object_list(
                box, self._parallel.last_stage_rank, group=self._parallel.pp_group, device=self._device
            )
            metrics, message = box[0]
        else:
            message = error and f"{type(error).__name__}: {error}"
        failed = torch.tensor(float(message is not None), device=self._device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if error is not None:
            raise error
        if float(failed):
            raise EngineError(f"the objective failed on another rank: {message or 'see its traceback'}")
        return metrics
