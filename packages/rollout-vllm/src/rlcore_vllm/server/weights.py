"""Weight updates of one server: sent to its workers, or written to a folder that they read.

The server is paused meanwhile; `rlcore_kit.serving.server_rollout` pauses it, resets caches and labels the version.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import WorkerError
from rlcore_kit.serving.weight_files import write_weights
from rlcore_kit.weight_transfer import TransferStats, WeightSender, open_sender
from rlcore_vllm.server.api import VLLMServerAPI
from rlcore_vllm.server.settings import ServerSettings

ANSWER_TIMEOUT_S = 10
"""Timeout of the server's answer to a transfer that failed on this side."""


class ServerWeights:
    """Replaces the weights of one server.

    Args:
        workers: number of processes that share the model, each with
            `rlcore_vllm.server.worker.ServerWorkerExtension`.

    Attributes:
        stats: of the last transfer.
    """

    def __init__(self, api: VLLMServerAPI, settings: ServerSettings, workers: int) -> None:
        self._api, self._settings, self._workers = api, settings, workers
        self._sender: WeightSender | None = None
        self.stats: TransferStats | None = None

    def connect(self) -> None:
        """Connect the server's workers to this process, if weights are transferred and they are not connected.

        Raises:
            WorkerError: a worker cannot reach this process, or the server is gone.
        """
        settings = self._settings
        if settings.weights == "reload" or self._sender is not None:
            return
        sender, address = open_sender(
            settings.transport,
            receivers=self._workers,
            host=settings.weights_host,
            timeout_s=settings.weights_timeout_s,
            bucket_bytes=settings.bucket_mb << 20,
            delta=settings.delta,
        )
        try:
            self._api.call_workers("rlcore_connect", asdict(address), what="connect its workers for weights")
        except BaseException:
            sender.close()
            raise
        self._sender = sender

    def send(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Replace the weights by ``buckets``.

        Raises:
            WorkerError: the server did not take them, and holds a mixture.
        """
        if self._settings.weights == "transfer":
            self._transfer(buckets, version)
        else:
            self._reload(buckets, version)

    def close(self) -> None:
        """Disconnect the workers; idempotent."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _transfer(self, buckets: Iterable[WeightBucket], version: int) -> None:
        assert self._sender is not None
        connection = self._api.connection
        body = {"method": "rlcore_receive"}
        receiving: Future[Any] = connection.submit(
            connection.request("POST", "/collective_rpc", "take the weights", body=body)
        )
        try:
            self.stats = self._sender.send(buckets, version)
            answer = receiving.result(self._settings.weights_timeout_s)
        except WorkerError as error:
            self.close()
            raise WorkerError(f"{error}{_failure_of(receiving)}") from error
        except BaseException:
            self.close()
            receiving.cancel()
            raise
        if {str(taken) for taken in answer["results"]} != {str(version)}:
            self.close()
            raise WorkerError(f"{connection.url} was sent version {version} and took {answer['results']}")

    def _reload(self, buckets: Iterable[WeightBucket], version: int) -> None:
        settings = self._settings
        assert settings.weights_dir is not None
        folder = write_weights(settings.weights_dir, self._api.connection.url, buckets)
        what = f"read the weights in {folder}"
        self._api.call_workers("rlcore_read", str(folder), version, what=what, timeout_s=settings.weights_timeout_s)


def _failure_of(receiving: Future[Any]) -> str:
    """Return the server's own message about a transfer that failed, in brackets."""
    try:
        receiving.result(ANSWER_TIMEOUT_S)
    except TimeoutError:
        receiving.cancel()
        return ""
    except Exception as error:
        return f" ({error})"
    return ""
