"""Weights from the caller of `update_weights` to vLLM's workers, bucket by bucket."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch

from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.serving.weight_stream import with_device
from rlcore_kit.weight_transfer import TransferError, WeightSender, open_sender
from rlcore_vllm.backend import Backend

STAGING_BYTES = 512 << 20
"""Size of the transport's buffers; larger buckets are sent in pieces."""


class Delivery:
    """Loads weights into a paused `Backend`; after an error its workers hold a mixture until the next update."""

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self._backend, self._timeout_s = backend, timeout_s
        self._sender: WeightSender | None = None

    def load(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Give all workers all buckets as ``version``.

        Raises:
            EngineError: a worker cannot load them, some are missing, or they did not arrive in time.
            WorkerError: the engine is gone.
        """
        if self._backend.local:
            self._load_here(buckets, version)
        else:
            self._send(buckets, version)

    def close(self) -> None:
        """Close connections to the workers; idempotent."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _load_here(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Pass the buckets by reference to the only worker, in this process."""
        self._call("rlcore_begin")
        try:
            for bucket in buckets:
                self._call("rlcore_load", bucket.tensors)
        except BaseException:
            self._call("rlcore_cancel")
            raise
        self._call("rlcore_finish", version)

    def _send(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Send the buckets to worker processes, by the fastest transport that reaches all."""
        device, stream = with_device(buckets)
        if self._sender is None:
            self._connect(device)
        sender = self._sender
        assert sender is not None
        received = _Receiving(self._backend, version, self._timeout_s)
        try:
            sender.send(stream, version)
        except TransferError as error:
            self.close()
            received.wait(quietly=True)
            failed = self._backend.failure
            kind = EngineError if failed is None else type(failed)
            raise kind(f"the weight update {version} did not reach vLLM's workers: {failed or error}") from error
        except BaseException:
            self.close()
            received.wait(quietly=True)
            raise
        try:
            received.wait()
        except (
            Exception
        ):  # the workers received all buckets and could not load them: the connection is not in a defined state
            self.close()
            raise

    def _connect(self, device: torch.device) -> None:
        self._sender, address = open_sender(
            receivers=self._backend.workers,
            timeout_s=self._timeout_s,
            bucket_bytes=STAGING_BYTES,
            device=device,
        )
        self._call("rlcore_connect", vars(address))

    def _call(self, method: str, *args: Any) -> list[Any]:
        return self._backend.call_workers(method, *args, timeout_s=self._timeout_s)


class _Receiving:
    """Has all workers receive a version in a thread, while it is being sent."""

    def __init__(self, backend: Backend, version: int, timeout_s: float) -> None:
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(backend, version, timeout_s), daemon=True)
        self._thread.start()

    def wait(self, *, quietly: bool = False) -> None:
        self._thread.join()
        if self._error is not None and not quietly:
            raise self._error

    def _run(self, backend: Backend, version: int, timeout_s: float) -> None:
        try:
            for taken in backend.call_workers("rlcore_receive", timeout_s=timeout_s):
                if taken != str(version):
                    raise EngineError(f"vLLM's workers cannot load the weight update {version}: {taken}")
        except Exception as error:
            self._error = error
