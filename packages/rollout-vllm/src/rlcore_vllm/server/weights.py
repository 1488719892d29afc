"""New weights for one server: sent into its workers, or written to a folder that it reads.

The server is paused meanwhile; `rlcore_vllm.server.engine` sees to that, to caches and to the label.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import WorkerError
from rlcore_kit.serving.connection import Connection
from rlcore_kit.weight_transfer import TransferStats, WeightSender, open_sender
from rlcore_vllm.server.settings import ServerSettings

ANSWER_S = 10
"""How long a server's own account of a failed transfer is waited for."""


class ServerWeights:
    """Brings weights into the server behind ``connection``.

    Args:
        workers: processes among which the server divides the model, with
            `rlcore_vllm.server.worker.ServerWorkerExtension`.

    Attributes:
        stats: of the last transfer.
    """

    def __init__(self, connection: Connection, settings: ServerSettings, workers: int) -> None:
        self._connection, self._settings, self._workers = connection, settings, workers
        self._sender: WeightSender | None = None
        self.stats: TransferStats | None = None

    def begin(self) -> None:
        """Have everything ready that the server could refuse; nothing is sent yet, and no collective is entered.

        Raises:
            WorkerError: a worker does not reach this process, or the server is gone.
        """
        if self._settings.weights == "transfer" and self._sender is None:
            settings = self._settings
            sender, address = open_sender(
                settings.transport,
                receivers=self._workers,
                host=settings.weights_host,
                timeout_s=settings.weights_timeout_s,
                bucket_bytes=settings.bucket_mb << 20,
                delta=settings.delta,
            )
            try:
                self.call_workers("rlcore_connect", asdict(address), what="connect its workers for weights")
            except BaseException:
                sender.close()
                raise
            self._sender = sender

    def send(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Replace the weights.

        Raises:
            WorkerError: the server did not take them, and holds a mixture now.
        """
        if self._settings.weights == "transfer":
            self._transfer(buckets, version)
        else:
            self._reload(buckets, version)

    def call_workers(self, method: str, *args: Any, what: str, timeout_s: float | None = None) -> list[Any]:
        """Call ``method`` of every worker with plain data; the results, of which numbers come as strings."""
        body = {"method": method, "args": list(args)}
        answer = self._connection.ask("POST", "/collective_rpc", what, body=body, timeout_s=timeout_s)
        return list((answer or {}).get("results", ()))

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _transfer(self, buckets: Iterable[WeightBucket], version: int) -> None:
        assert self._sender is not None
        body = {"method": "rlcore_receive"}
        taking: Future[Any] = self._connection.submit(
            self._connection.request("POST", "/collective_rpc", "take the weights", body=body)
        )
        try:
            self.stats = self._sender.send(buckets, version)
            answer = taking.result(self._settings.weights_timeout_s)
        except WorkerError as error:
            self.close()
            raise WorkerError(f"{error}{_account(taking)}") from error
        except BaseException:
            self.close()
            taking.cancel()
            raise
        if {str(taken) for taken in answer["results"]} != {str(version)}:
            self.close()
            raise WorkerError(f"{self._connection.url} was sent version {version} and took {answer['results']}")

    def _reload(self, buckets: Iterable[WeightBucket], version: int) -> None:
        assert self._settings.weights_dir is not None
        name = self._connection.url.partition("://")[2]
        folder = self._settings.weights_dir / "".join(letter if letter.isalnum() else "-" for letter in name)
        write_weights(folder, buckets)
        self.call_workers(
            "rlcore_read",
            str(folder.resolve()),
            version,
            what=f"read the weights in {folder}",
            timeout_s=self._settings.weights_timeout_s,
        )


def write_weights(folder: Path, buckets: Iterable[WeightBucket]) -> None:
    """Write a file per bucket; older ones go."""
    from safetensors.torch import save_file

    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for index, bucket in enumerate(buckets):
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket.tensors}
        save_file(tensors, folder / f"model-{index:05d}.safetensors")


def _account(taking: Future[Any]) -> str:
    """What the server itself says of a transfer that failed."""
    try:
        taking.result(ANSWER_S)
    except TimeoutError:
        taking.cancel()
        return ""
    except Exception as error:
        return f" ({error})"
    return ""
