"""Weight updates of one server: posted, broadcast, or written to files, as the setting ``weights`` says.

The server is paused meanwhile; `rlcore_kit.serving.server_rollout` pauses it, resets caches and labels the version.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError, WorkerError
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.weight_files import write_weights
from rlcore_sglang import payload
from rlcore_sglang.settings import SGLangSettings
from rlcore_sglang.update_group import UpdateGroup


class Delivery(ABC):
    """Gives the server behind ``connection`` all tensors of a stream."""

    def __init__(self, connection: Connection, settings: SGLangSettings) -> None:
        self._connection, self._settings = connection, settings

    def prepare(self, device: torch.device) -> None:  # noqa: B027 - most have nothing to prepare
        """Connect everything that the server could refuse, before it is paused and anything is sent.

        Args:
            device: of the weights.
        """

    @abstractmethod
    def send(self, buckets: Iterable[WeightBucket]) -> None:
        """Replace the weights.

        Raises:
            EngineError, WorkerError: the server did not take them all, and may hold a mixture.
        """

    def close(self) -> None:  # noqa: B027
        """Disconnect what `prepare` connected; idempotent."""

    def _post(self, path: str, what: str, body: Any) -> None:
        limit = self._settings.weights_timeout_s
        self._connection.ask("POST", path, what, body=body, timeout_s=limit)

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        """Hold a session of weight updates on the server; one that an earlier update left open is closed first."""
        try:
            self._post("/begin_weight_update", "begin a weight update", {})
        except EngineError as error:
            if "already open" not in str(error):
                raise
            self._post("/end_weight_update", "end a weight update", {})
            self._post("/begin_weight_update", "begin a weight update", {})
        try:
            yield
        except BaseException:
            with contextlib.suppress(EngineError, WorkerError):  # the first failure is reported
                self._post("/end_weight_update", "end a weight update", {})
            raise
        self._post("/end_weight_update", "end a weight update", {})


class Posted(Delivery):
    """Posts flattened buckets by HTTP: bytes from the CPU, handles of memory from a GPU that the server shares."""

    def __init__(self, connection: Connection, settings: SGLangSettings, workers: int) -> None:
        super().__init__(connection, settings)
        self._workers = workers

    def send(self, buckets: Iterable[WeightBucket]) -> None:
        with self._session():
            for bucket in buckets:
                for piece in _pieces(bucket, self._settings.bucket_mb << 20):
                    body = {
                        # every worker reads a separate copy, and takes its shard
                        "serialized_named_tensors": [payload.serialized(piece)] * self._workers,
                        "load_format": payload.FORMAT,
                        "flush_cache": False,
                    }
                    self._post("/update_weights_from_tensor", f"take {_named(piece)}", body)


class Broadcast(Delivery):
    """Broadcasts flattened buckets by NCCL or gloo."""

    def __init__(self, connection: Connection, settings: SGLangSettings, workers: int) -> None:
        super().__init__(connection, settings)
        self._workers = workers
        self._update_group: UpdateGroup | None = None
        self._on_gpu = False

    def prepare(self, device: torch.device) -> None:
        if self._update_group is None:
            settings = self._settings
            backend = settings.weights_backend
            if backend == "auto":
                backend = "nccl" if device.type == "cuda" else "gloo"
            self._on_gpu = backend == "nccl"
            self._update_group = UpdateGroup(
                self._connection, backend, settings.weights_host, self._workers, settings.weights_timeout_s
            )

    def send(self, buckets: Iterable[WeightBucket]) -> None:
        try:
            with self._session():
                for bucket in buckets:
                    for piece in _pieces(bucket, self._settings.bucket_mb << 20):
                        self._broadcast(piece)
        except BaseException:
            self.close()  # the workers may be in the middle of a broadcast
            raise

    def _broadcast(self, piece: list[tuple[str, torch.Tensor]]) -> None:
        assert self._update_group is not None
        flat = payload.flattened(piece)
        flat = flat.cuda() if self._on_gpu else flat.cpu()
        body = {
            "names": [name for name, _ in piece],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in piece],
            "shapes": [list(tensor.shape) for _, tensor in piece],
            "group_name": self._update_group.name,
            "load_format": payload.FORMAT,
            "flush_cache": False,
        }
        what = f"take {_named(piece)}"
        taking = self._connection.submit(
            self._connection.request("POST", "/update_weights_from_distributed", what, body=body)
        )
        self._update_group.broadcast(flat, taking, what)

    def close(self) -> None:
        if self._update_group is not None:
            self._update_group.close()
            self._update_group = None


class Written(Delivery):
    """Writes files to a folder that this process and the server see."""

    def send(self, buckets: Iterable[WeightBucket]) -> None:
        assert self._settings.weights_dir is not None
        folder = write_weights(self._settings.weights_dir, self._connection.url, buckets)
        body = {"model_path": str(folder), "load_format": "safetensors", "flush_cache": False}
        self._post("/update_weights_from_disk", f"read the weights in {folder}", body)


def open_delivery(connection: Connection, settings: SGLangSettings, workers: int) -> Delivery:
    """Return the `Delivery` that ``settings.weights`` names, to a server whose model ``workers`` processes share."""
    if settings.weights == "tensor":
        return Posted(connection, settings, workers)
    if settings.weights == "distributed":
        return Broadcast(connection, settings, workers)
    return Written(connection, settings)


def _pieces(bucket: WeightBucket, max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield parts of the bucket of at most ``max_bytes`` bytes; a larger tensor is a separate part."""
    piece: list[tuple[str, torch.Tensor]] = []
    for name, tensor in bucket.tensors:
        if piece and sum(other.nbytes for _, other in piece) + tensor.nbytes > max_bytes:
            yield piece
            piece = []
        piece.append((name, tensor))
    if piece:
        yield piece


def _named(piece: list[tuple[str, torch.Tensor]]) -> str:
    first = piece[0][0]
    return first if len(piece) == 1 else f"{first} … {piece[-1][0]}"
