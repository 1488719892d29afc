"""New weights for one server, by the way that ``weights`` names.

The server is paused meanwhile; `rlcore_sglang.server` sees to that, to the cache and to the label of the version.
"""

from __future__ import annotations

import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError, WorkerError
from rlcore_kit.serving.connection import Connection
from rlcore_sglang import payload
from rlcore_sglang.config import SGLangSettings
from rlcore_sglang.group import UpdateGroup

Shapes = Mapping[str, tuple[int, ...]]


class Delivery(ABC):
    """One way of giving the server behind ``connection`` all tensors of a stream."""

    def __init__(self, connection: Connection, settings: SGLangSettings) -> None:
        self._connection, self._settings = connection, settings

    def prepare(self, device: torch.device) -> None:  # noqa: B027 - most have nothing to prepare
        """Have everything ready that the server could refuse, before it is paused and anything is sent."""

    @abstractmethod
    def send(self, buckets: Iterable[WeightBucket]) -> None:
        """Replace the weights.

        Raises:
            EngineError, WorkerError: the server did not take them all, and may hold a mixture now.
        """

    def close(self) -> None:  # noqa: B027
        """Give up what `prepare` made; idempotent."""

    def _post(self, path: str, what: str, body: Any) -> None:
        limit = self._settings.weights_timeout_s
        self._connection.ask("POST", path, what, body=body, timeout_s=limit)

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        """What the server demands around tensors. One that an earlier update left open is closed first."""
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
            with contextlib.suppress(EngineError, WorkerError):  # what went wrong is on its way already
                self._post("/end_weight_update", "end a weight update", {})
            raise
        self._post("/end_weight_update", "end a weight update", {})


class Posted(Delivery):
    """Flattened buckets by HTTP: bytes from the CPU, handles of memory from a GPU that the server shares."""

    def __init__(self, connection: Connection, settings: SGLangSettings, workers: int) -> None:
        super().__init__(connection, settings)
        self._workers = workers

    def send(self, buckets: Iterable[WeightBucket]) -> None:
        with self._session():
            for bucket in buckets:
                for piece in _pieces(bucket, self._settings.bucket_mb << 20):
                    body = {
                        # every worker reads one of its own, and takes its part of it
                        "serialized_named_tensors": [payload.serialized(piece)] * self._workers,
                        "load_format": payload.FORMAT,
                        "flush_cache": False,
                    }
                    self._post("/update_weights_from_tensor", f"take {_named(piece)}", body)


class Broadcast(Delivery):
    """Flattened buckets by broadcast, NCCL or gloo."""

    def __init__(self, connection: Connection, settings: SGLangSettings, workers: int) -> None:
        super().__init__(connection, settings)
        self._workers = workers
        self._group: UpdateGroup | None = None
        self._on_gpu = False

    def prepare(self, device: torch.device) -> None:
        if self._group is None:
            settings = self._settings
            backend = settings.weights_backend
            if backend == "auto":
                backend = "nccl" if device.type == "cuda" else "gloo"
            self._on_gpu = backend == "nccl"
            self._group = UpdateGroup(
                self._connection, backend, settings.weights_host, self._workers, settings.weights_timeout_s
            )

    def send(self, buckets: Iterable[WeightBucket]) -> None:
        try:
            with self._session():
                for bucket in buckets:
                    for piece in _pieces(bucket, self._settings.bucket_mb << 20):
                        self._broadcast(piece)
        except BaseException:
            self.close()  # the workers may be anywhere in it
            raise

    def _broadcast(self, piece: list[tuple[str, torch.Tensor]]) -> None:
        assert self._group is not None
        flat = payload.flattened(piece)
        flat = flat.cuda() if self._on_gpu else flat.cpu()
        body = {
            "names": [name for name, _ in piece],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in piece],
            "shapes": [list(tensor.shape) for _, tensor in piece],
            "group_name": self._group.name,
            "load_format": payload.FORMAT,
            "flush_cache": False,
        }
        what = f"take {_named(piece)}"
        taking = self._connection.submit(
            self._connection.request("POST", "/update_weights_from_distributed", what, body=body)
        )
        self._group.broadcast(flat, taking, what)

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class Written(Delivery):
    """Files in a folder that this process and the server see."""

    def send(self, buckets: Iterable[WeightBucket]) -> None:
        from safetensors.torch import save_file

        assert self._settings.weights_dir is not None
        name = self._connection.url.partition("://")[2]
        folder = self._settings.weights_dir / "".join(letter if letter.isalnum() else "-" for letter in name)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for index, bucket in enumerate(buckets):
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket.tensors}
            save_file(tensors, folder / f"model-{index:05d}.safetensors")
        body = {"model_path": str(folder.resolve()), "load_format": "safetensors", "flush_cache": False}
        self._post("/update_weights_from_disk", f"read the weights in {folder}", body)


def open_delivery(connection: Connection, settings: SGLangSettings, workers: int) -> Delivery:
    """The way that ``settings.weights`` names, to a server that divides its model among ``workers`` processes."""
    if settings.weights == "tensor":
        return Posted(connection, settings, workers)
    if settings.weights == "distributed":
        return Broadcast(connection, settings, workers)
    return Written(connection, settings)


def shapes_of(model: str) -> Shapes:
    """Names and shapes of all tensors in a model's folder; empty if this process cannot read it."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in Path(model).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def checked(buckets: Iterable[WeightBucket], shapes: Shapes) -> Iterator[WeightBucket]:
    """The stream, if it holds what the model's folder holds.

    SGLang (0.5) skips tensors that it does not know, keeps the old weights for those that are missing, and ends the
    whole server at a tensor of another shape.

    Raises:
        EngineError: a tensor is unknown, has another shape, or is missing at the end.
    """
    missing = set(shapes)
    for bucket in buckets:
        if shapes:
            tensors = tuple(pair for pair in bucket.tensors if pair[0] in shapes or pair[0] != _HEAD)
            for name, tensor in tensors:
                if name not in shapes:
                    raise EngineError(f"the weight update holds {name}, which the model does not have")
                if tuple(tensor.shape) != shapes[name]:
                    raise EngineError(
                        f"the weight update holds {name} of shape {list(tensor.shape)} instead of {list(shapes[name])}"
                    )
            missing -= {name for name, _ in tensors}
            bucket = WeightBucket(tensors)
        if bucket.tensors:
            yield bucket
    if missing:
        named = ", ".join(sorted(missing)[:3]) + (" …" if len(missing) > 3 else "")
        raise EngineError(f"the weight update lacks {len(missing)} of {len(shapes)} tensors: {named}")


_HEAD = "lm_head.weight"
"""Where it is tied to the embedding, folders lack it, and trainers may send it."""


def _pieces(bucket: WeightBucket, most_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Parts of the bucket of at most so many bytes; a larger tensor is a part of its own."""
    piece: list[tuple[str, torch.Tensor]] = []
    for name, tensor in bucket.tensors:
        if piece and sum(other.nbytes for _, other in piece) + tensor.nbytes > most_bytes:
            yield piece
            piece = []
        piece.append((name, tensor))
    if piece:
        yield piece


def _named(piece: list[tuple[str, torch.Tensor]]) -> str:
    first = piece[0][0]
    return first if len(piece) == 1 else f"{first} … {piece[-1][0]}"
