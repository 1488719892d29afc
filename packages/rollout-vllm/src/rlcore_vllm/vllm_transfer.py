"""Weights by vLLM's weight-transfer engines, NCCL or CUDA IPC, through its start, update and finish.

Both transfer tensors between GPUs and have not been run on a GPU: the tests run the sequence of calls on the CPU, with
a stand-in for vLLM's engine. rlcore's transfer (`rlcore_vllm.delivery`) is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache, cached_property
from typing import Any, Literal

import torch

from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError, WorkerError
from rlcore_kit.serving.ports import unused_port
from rlcore_vllm.backend import Backend
from rlcore_vllm.quirks import CallableList

Kind = Literal["nccl", "ipc"]


class VLLMTransfer:
    """Loads weights into a paused `Backend` bucket by bucket; after an error its workers hold a mixture.

    Every bucket is a transfer of vLLM's trainer engine, between one begin and one finish of the workers. That engine is
    built at the first bucket, on whose device the others must be too.
    """

    def __init__(self, backend: Backend, kind: Kind, timeout_s: float) -> None:
        self._backend, self._kind, self._timeout_s = backend, kind, timeout_s
        self._engine: Any = None

    def load(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Give all workers all buckets as ``version``.

        Raises:
            EngineError: a worker cannot load them, or some are missing.
            WorkerError: the engine is gone, or they did not arrive in time.
        """
        begun = False
        try:
            for bucket in buckets:
                source = _source_class()(bucket)
                if not begun:
                    self._connect(bucket.tensors[0][1].device, source)
                    self._call("rlcore_begin_transfer")
                    begun = True
                self._engine.source = source
                self._engine.send_weights()
                self._engine.source = None
                del bucket, source
            if not begun:
                raise EngineError("the weight update is empty")
            self._call("rlcore_finish_transfer", version)
        except BaseException:
            self.close()
            if begun:
                with suppress(EngineError, WorkerError):  # the first failure is reported
                    self._call("rlcore_cancel")
            raise

    def close(self) -> None:
        """Close connections to the workers; idempotent."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _connect(self, device: torch.device, source: Any) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        if self._engine is not None:
            return
        if device.type == "cpu":
            raise EngineError(
                f"rollout.vllm.weight_transfer={self._kind} transfers weights between GPUs, and these are "
                "on the CPU; set it to rlcore"
            )
        self._engine = WeightTransferTrainerFactory.trainer_init(
            self._information(), client=_Client(self), source=source
        )

    def _information(self) -> Any:
        if self._kind == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=0)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            rank=0, master_address="127.0.0.1", master_port=unused_port(), world_size=1 + self._backend.workers
        )

    def _call(self, method: str, *args: Any) -> None:
        self._backend.call_workers(method, *args, timeout_s=self._timeout_s)


class _Client:
    """Client for vLLM's trainer engine, which begins and ends an update with every bucket; the workers do so once."""

    def __init__(self, transfer: VLLMTransfer) -> None:
        self._transfer = transfer

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the workers."""
        self._transfer._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        """Do nothing."""

    def update_weights(self, update_info: Any) -> None:
        """Have the workers receive one bucket."""
        self._transfer._call("rlcore_take_transfer", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Do nothing."""


@cache
def _source_class() -> Any:
    """Return a subclass of vLLM's ``WeightSource`` over one bucket."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class BucketSource(WeightSource):  # type: ignore[misc]
        def __init__(self, bucket: WeightBucket) -> None:
            self._bucket = bucket

        @cached_property
        def metadata(self) -> Callable[[], list[Any]]:
            return CallableList(ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self)

        def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:  # vLLM 0.33
            return iter(self._bucket.tensors)

        __iter__ = iter_full  # vLLM 0.32

    return BucketSource
