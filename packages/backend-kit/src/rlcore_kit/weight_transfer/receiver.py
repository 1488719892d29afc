"""The receiving side, in a rollout process: `open_receiver`, then `WeightReceiver.load_into` for every version."""

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
from rlcore_kit.weight_transfer.channel import MAX_MESSAGE_BYTES, Channel, TransferError
from rlcore_kit.weight_transfer.cuda_ipc import CudaIpcReceiver
from rlcore_kit.weight_transfer.delta import DeltaDecoder
from rlcore_kit.weight_transfer.flat import Entry, flat_bytes, unpack
from rlcore_kit.weight_transfer.shared_memory import SharedMemoryReceiver
from rlcore_kit.weight_transfer.transport import ReceiverEnd
from rlcore_kit.weight_transfer.transport_choice import Transport, local_weight_location


class WeightReceiver:
    """Receives weights from a sender; see `open_receiver`.

    It is closed by an error and by `close`; open a new one then.

    Attributes:
        version: version of the weights that the last `receive` began to receive; −1 before the first.
        transport: the transport of the bytes; None before the first `receive`.
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
        """Load the next version into ``engine`` and return its number; if the engine fails, report it to the sender.

        Raises:
            TransferError: the sender died, failed, or did not send within the timeout.
        """
        buckets = self.receive()
        try:
            engine.update_weights(buckets, self.version)
            for _ in buckets:  # the other receivers would wait for an engine that stops early
                raise TransferError(
                    f"{type(engine).__name__}.update_weights did not take all buckets; it must iterate to the end"
                )
        except BaseException as error:
            self.abort(error)
            raise
        return self.version

    def receive(self) -> Iterator[WeightBucket]:
        """Begin to receive the next version: set `version`, and return an iterator of its buckets.

        The caller may keep the tensors.

        Raises:
            TransferError: the sender died, failed, or did not begin within the timeout.
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
        """Wait until all receivers are connected to the sender, and open the transport; `receive` calls it."""
        if self._closed:
            raise TransferError("this weight receiver is closed; open a new one (open_receiver)")
        if self._end is not None:
            return
        try:
            self._open()
        except BaseException as error:
            self.abort(error)
            raise

    def _open(self) -> None:
        offer = self._channel.receive(self._timeout_s, "offer a transport (are all receivers connected?)")
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
        """Report to the sender that this receiver cannot continue, and close."""
        if not self._closed:
            with contextlib.suppress(TransferError):  # the sender may have died
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
                again = message["bucket"] < taken  # another receiver requested it; taking it twice is harmless
                bucket = self._take(message)
                if not again:
                    taken += 1
                    yield bucket
                del bucket
            if self._decoder is not None:
                self._decoder.finish((message["base"][0], message["base"][1]))
            self._channel.send({"done": self.version}, self._timeout_s)
        except GeneratorExit:
            self.abort(TransferError("the receiving engine stopped before the last bucket"))
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
                raise TransferError(f"{name} was damaged in transfer twice")
        del flat  # before the copies are made: at most two buckets exist, including the previous one
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
    """Connect to a sender, in a rollout process, without waiting for the other receivers.

    Args:
        rank: number of this receiver, 0 to ``address.receivers - 1``; each is used once.
        device: device of the received tensors.
        timeout_s: timeout of each wait, in seconds; None uses that of ``address``.

    Raises:
        TransferError: no sender listens at ``address``.
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
    channel.max_message_bytes = MAX_MESSAGE_BYTES
    channel.send({"token": address.token, "rank": rank, "location": vars(local_weight_location(device))}, timeout_s)
    return WeightReceiver(channel, address, rank, connection.getsockname()[0], device)
