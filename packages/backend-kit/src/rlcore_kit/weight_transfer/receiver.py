"""A rollout process: `open_receiver`, then `WeightReceiver.load_into` for every version."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from rlcore.engines.rollout import RolloutEngine
from rlcore.engines.weight_bucket import WeightBucket
from rlcore_kit.weight_transfer.address import Address
from rlcore_kit.weight_transfer.broadcast import BroadcastReceiver
from rlcore_kit.weight_transfer.channel import MOST_BYTES, Channel, TransferError
from rlcore_kit.weight_transfer.choice import Transport, facts_here
from rlcore_kit.weight_transfer.cuda_ipc import CudaIpcReceiver
from rlcore_kit.weight_transfer.delta import DeltaDecoder
from rlcore_kit.weight_transfer.flat import Entry, flat_bytes, unpack
from rlcore_kit.weight_transfer.shared_memory import SharedMemoryReceiver
from rlcore_kit.weight_transfer.transport import ReceiverEnd


class WeightReceiver:
    """Takes weights from a sender; see `open_receiver`.

    After an error, and after `close`, it is of no use any more: open another one.

    Attributes:
        version: the version that the last `receive` began.
        transport: by which the bytes come; None before the first `receive`.
    """

    def __init__(self, channel: Channel, address: Address, rank: int, own_host: str, device: torch.device) -> None:
        self._channel, self._address, self._rank, self._own_host = channel, address, rank, own_host
        self._device, self._timeout_s = device, address.timeout_s
        self._end: ReceiverEnd | None = None
        self._decoder: DeltaDecoder | None = None
        self._closed = False
        self.version = -1
        self.transport: Transport | None = None

    def load_into(self, engine: RolloutEngine) -> int:
        """Take the next version into ``engine`` and return it; the sender learns of it if the engine fails.

        Raises:
            TransferError: the sender died, failed, or did not send in time.
        """
        buckets = self.receive()
        try:
            engine.update_weights(buckets, self.version)
            for _ in buckets:  # an engine that stops early would leave the others waiting
                raise TransferError(f"{type(engine).__name__}.update_weights did not take all buckets")
        except BaseException as error:
            self.abort(error)
            raise
        return self.version

    def receive(self) -> Iterator[WeightBucket]:
        """The next version's buckets, whose tensors are the caller's to keep; `version` is known when this returns.

        Raises:
            TransferError: the sender died, failed, or did not begin in time.
        """
        self.connect()
        try:
            message = self._channel.receive(self._timeout_s, "begin to send a version")
            self.version = message["begin"]
            holds = None
            if self._decoder is not None:
                holds = self._decoder.base
                self._decoder.begin()
            self._channel.send({"holds": holds}, self._timeout_s)
        except BaseException as error:
            self.abort(error)
            raise
        return self._buckets()

    def connect(self) -> None:
        """Wait until the sender has all its receivers, and open the transport; the first `receive` does it too."""
        if self._closed:
            raise TransferError("this receiver is closed; open a new one")
        if self._end is not None:
            return
        try:
            self._open()
        except BaseException as error:
            self.abort(error)
            raise

    def _open(self) -> None:
        offer = self._channel.receive(self._timeout_s, "offer a transport (are all receivers there?)")
        transport: Transport = offer["transport"]
        match transport:
            case "shm":
                self._end = SharedMemoryReceiver(offer, self._channel, self._timeout_s)
            case "ipc":
                self._end = CudaIpcReceiver(offer, self._channel, self._device, self._timeout_s)
            case _:
                self._end = BroadcastReceiver(
                    transport, self._address.host, self._rank, offer, self._channel, self._own_host, self._device,
                    self._timeout_s,
                )  # fmt: skip
        self.transport = transport
        if offer["delta"]:
            self._decoder = DeltaDecoder()
        self._channel.send({"opened": transport}, self._timeout_s)

    def abort(self, error: BaseException) -> None:
        """Tell the sender that this receiver cannot go on, and close."""
        if not self._closed:
            with contextlib.suppress(TransferError):  # it may be the sender that is gone
                self._channel.send({"failed": f"{type(error).__name__}: {error}"}, timeout_s=1)
        self.close()

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._closed = True
        if self._end is not None:
            self._end.close()
            self._end = None
        self._channel.close()

    def _buckets(self) -> Iterator[WeightBucket]:
        try:
            taken = 0
            while True:
                self._channel.send({"ready": taken}, self._timeout_s)
                message = self._channel.receive(self._timeout_s, f"send bucket {taken + 1} of version {self.version}")
                if "end" in message:
                    break
                again = message["bucket"] < taken  # another receiver asked for it; harmless to take twice
                bucket = self._take(message)
                if not again:
                    taken += 1
                    yield bucket
                del bucket
            if self._decoder is not None:
                self._decoder.finish((message["base"][0], message["base"][1]))
            self._channel.send({"done": self.version}, self._timeout_s)
        except GeneratorExit:
            self.abort(TransferError("it stopped before the last bucket"))
            raise
        except BaseException as error:
            self.abort(error)
            raise

    def _take(self, message: dict[str, Any]) -> WeightBucket:
        name = f"bucket {message['bucket'] + 1} of version {self.version}"
        entries, flat = self._take_bytes(message, name)
        if self._decoder is None:
            return unpack(flat.to(self._device), entries)
        if not self._decoder.apply(entries, flat.cpu(), message["checksum"]):
            self._channel.send({"again": message["bucket"]}, self._timeout_s)
            message = self._channel.receive(self._timeout_s, f"send {name} again")
            entries, flat = self._take_bytes(message, name)
            if not self._decoder.apply(entries, flat.cpu(), message["checksum"]):
                raise TransferError(f"{name} arrived damaged twice")
        del flat  # before the copies are made: at most two buckets exist, the one before included
        return self._decoder.bucket(entries, self._device)

    def _take_bytes(self, message: dict[str, Any], name: str) -> tuple[list[Entry], torch.Tensor]:
        assert self._end is not None
        entries = [Entry.from_json(fields) for fields in message["entries"]]
        flat = torch.empty(flat_bytes(entries), dtype=torch.uint8, device=self._end.device)
        self._end.receive_into(flat, name)
        return entries, flat


def open_receiver(
    address: Address, rank: int, *, device: torch.device | str = "cpu", timeout_s: float | None = None
) -> WeightReceiver:
    """Connect to a sender, in a rollout process; does not wait for the other receivers.

    Args:
        rank: 0 to ``address.receivers - 1``, each once.
        device: where the received tensors shall be.

    Raises:
        TransferError: nobody listens there.
    """
    if timeout_s is None:
        timeout_s = address.timeout_s
    address = replace(address, timeout_s=timeout_s)
    try:
        connection = socket.create_connection((address.host, address.port), timeout=timeout_s)
    except OSError as error:
        raise TransferError(
            f"receiver {rank} cannot reach the weight sender at {address.host}:{address.port}: {error}"
        ) from error
    device = torch.device(device)
    channel = Channel(connection, "the weight sender")
    channel.most_bytes = MOST_BYTES
    channel.send({"token": address.token, "rank": rank, "facts": vars(facts_here(device))}, timeout_s)
    return WeightReceiver(channel, address, rank, connection.getsockname()[0], device)
