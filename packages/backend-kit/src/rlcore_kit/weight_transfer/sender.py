"""The sending side, in the trainer's first rank: `open_sender`, then `WeightSender.send` for every version.

Protocol, with all messages on the receivers' control connections: *begin* with a version, answered by the version that
each receiver holds; then, whenever all are *ready*, a *bucket*, whose bytes the transport moves; *end*, answered by
*done*. In delta mode a receiver may request a bucket *again*; it is sent to all receivers in full before the next one.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlcore.engines.weight_bucket import WeightBucket
from rlcore.metrics import Metrics
from rlcore_kit.weight_transfer.address import Address
from rlcore_kit.weight_transfer.broadcast import BroadcastSender
from rlcore_kit.weight_transfer.channel import MAX_MESSAGE_BYTES, Channel, TransferError, gather
from rlcore_kit.weight_transfer.cuda_ipc import CudaIpcSender
from rlcore_kit.weight_transfer.delta import DeltaEncoder
from rlcore_kit.weight_transfer.flat import Payload, pack
from rlcore_kit.weight_transfer.shared_memory import SharedMemorySender
from rlcore_kit.weight_transfer.transport import SenderEnd
from rlcore_kit.weight_transfer.transport_choice import Transport, WeightLocation, choose, local_weight_location


@dataclass(frozen=True)
class TransferStats:
    """Measurements of one `WeightSender.send`.

    Attributes:
        version: version of the sent weights.
        transport: transport of the bytes.
        delta: True if only changed elements were sent.
        buckets: number of buckets.
        full_bytes: size of the weights in bytes.
        sent_bytes: bytes given to the transport, counted once for all receivers.
        changed: share of the elements whose bits had changed; None if they were not compared.
        resent_buckets: number of buckets that failed a receiver's checksum and were sent again in full.
        seconds: time from the call to the confirmation of the last receiver, including the export.
    """

    version: int
    transport: Transport
    delta: bool
    buckets: int
    full_bytes: int
    sent_bytes: int
    changed: float | None
    resent_buckets: int
    seconds: float

    def metrics(self) -> Metrics:
        """Return ``sent_mb`` (MiB), ``delta`` (1 for a delta), ``resent_buckets`` and, if measured, ``changed``."""
        found = Metrics()
        found.sum("sent_mb", self.sent_bytes / 2**20)
        found.mean("delta", float(self.delta))
        found.sum("resent_buckets", self.resent_buckets)
        if self.changed is not None:
            found.mean("changed", self.changed)
        return found


class WeightSender:
    """Sends weights to a fixed set of receivers; see `open_sender`.

    It is closed by an error and by `close`; open a new one then.

    Attributes:
        transport: the transport of the bytes; None until ``auto`` has been resolved.
    """

    def __init__(
        self,
        listener: socket.socket,
        address: Address,
        transport: Transport | Literal["auto"],
        bucket_bytes: int,
        delta: bool,
        device: torch.device,
    ) -> None:
        self._listener: socket.socket | None = listener
        self._address, self._requested, self._device = address, transport, device
        # Memory: the trainer's bucket (and the next tensor, which may exist already), two pieces for staging, and
        # encoded blocks of at most half a bucket: together at most two buckets.
        self._piece_bytes = max(bucket_bytes // 8, 1)
        self._encoder = DeltaEncoder(max_new_bytes=bucket_bytes // 2) if delta else None
        self._channels: list[Channel] = []
        self._end: SenderEnd | None = None
        self._closed = False
        self._timeout_s = address.timeout_s
        self.transport: Transport | None = None if transport == "auto" else transport

    def send(self, buckets: Iterable[WeightBucket], version: int) -> TransferStats:
        """Send all ``buckets`` to all receivers as ``version``.

        ``buckets`` is consumed to the end even after an error: the trainer's other ranks take part in making them.

        Raises:
            TransferError: a receiver died, failed, or did not connect within the timeout; the message names it. The
                sender reports the failure to the other receivers and is closed.
        """
        start = time.monotonic()
        iterator = iter(buckets)
        try:
            stats = self._send(iterator, version)
        except BaseException as error:
            self._report_failure(error)
            self.close()
            if isinstance(error, Exception):
                for _ in iterator:
                    pass
            raise
        return TransferStats(**stats, seconds=time.monotonic() - start)

    def connect(self) -> None:
        """Wait until all receivers are connected, and open the transport; `send` calls it.

        Raises:
            TransferError: a receiver did not connect within the timeout, or cannot use the transport.
        """
        if self._closed:
            raise TransferError("this weight sender is closed; open a new one (open_sender), and new receivers")
        if self._end is not None:
            return
        try:
            self._accept()
        except BaseException as error:
            self._report_failure(error)
            self.close()
            raise

    def close(self) -> None:
        """Close the connections; idempotent."""
        self._closed = True
        if self._end is not None:
            self._end.close()
        for channel in self._channels:
            channel.close()
        if self._listener is not None:
            self._listener.close()
        self._end, self._listener, self._channels = None, None, []

    def _accept(self) -> None:
        assert self._listener is not None
        count, deadline = self._address.receivers, time.monotonic() + self._timeout_s
        arrived: dict[int, tuple[Channel, WeightLocation]] = {}
        while len(arrived) < count:
            missing = [rank for rank in range(count) if rank not in arrived]
            self._listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, (peer_host, *_) = self._listener.accept()
            except TimeoutError:
                raise TransferError(
                    f"{_ranks_text(missing, count)} did not connect within {self._timeout_s:g} s", missing
                ) from None
            channel = Channel(connection, f"a connection from {peer_host}")
            try:
                # Short, so that a foreign connection does not delay receivers: they identify themselves immediately.
                hello = channel.receive(max(min(deadline - time.monotonic(), 5), 0.001), "identify itself")
                if not hmac.compare_digest(str(hello.get("token")), self._address.token):
                    raise channel.failure("the token is wrong")
                rank, location = int(hello["rank"]), WeightLocation(**hello["location"])
                if rank not in missing:
                    raise channel.failure(f"receiver {rank} is connected already, or is not expected")
            except (TransferError, KeyError, TypeError, ValueError):
                channel.close()
                continue
            channel.rank, channel.peer = rank, f"receiver {rank} of {count}"
            channel.max_message_bytes = MAX_MESSAGE_BYTES
            arrived[rank] = channel, location
        self._channels = [arrived[rank][0] for rank in range(count)]
        self._listener.close()
        self._listener = None
        self._open([arrived[rank][1] for rank in range(count)])

    def _open(self, receivers: list[WeightLocation]) -> None:
        if self._requested == "auto":
            self.transport = choose(local_weight_location(self._device), receivers, self._encoder is not None)
        assert self.transport is not None
        cpu = torch.device("cpu")
        match self.transport:
            case "shm":
                self._end = SharedMemorySender(self._channels, self._piece_bytes, self._timeout_s)
            case "ipc":
                self._end = CudaIpcSender(self._channels, self._piece_bytes, self._device, self._timeout_s)
            case _:
                device = self._device if self.transport == "nccl" else cpu
                self._end = BroadcastSender(
                    self.transport, self._address.host, self._channels, self._piece_bytes, device, self._timeout_s
                )
        for rank, channel in enumerate(self._channels):
            offer = {"transport": self.transport, "delta": self._encoder is not None, **self._end.offer(rank)}
            channel.send(offer, self._timeout_s)
        self._end.open()
        gather(self._channels, self._timeout_s, f"open the transport {self.transport}")
        self._end.opened()

    def _send(self, buckets: Iterator[WeightBucket], version: int) -> dict[str, Any]:
        self.connect()
        assert self._end is not None
        self._send_to_all({"begin": version})
        answers = gather(self._channels, self._timeout_s, f"begin to receive version {version}")
        encoder = self._encoder
        full = True
        if encoder is not None:
            base = encoder.base
            full = base is None or any(answer["holds"] != list(base) for answer in answers)
            encoder.begin()
        count = full_bytes = sent_bytes = resent = 0
        names: list[str] = []
        while True:
            bucket = next(buckets, None)
            if bucket is not None:
                full_bytes += bucket.nbytes
                payload = pack(bucket) if encoder is None else encoder.encode(bucket, full)
                bucket = None  # this frame must not keep a full bucket after it was sent
            else:
                payload = None
            if self._resend_wanted(count, version):
                assert encoder is not None
                again = encoder.encode_full(names)
                sent_bytes += self._send_bucket(again, count - 1, version)
                resent += 1
                if self._resend_wanted(count, version):
                    raise TransferError(f"bucket {count} of version {version} was damaged in transfer twice")
                del again
            if payload is None:
                break
            names = [entry.name for entry in payload.entries]
            sent_bytes += self._send_bucket(payload, count, version)
            del payload
            count += 1
        self._send_to_all({"end": version, "base": None if encoder is None else encoder.finish(version)})
        gather(self._channels, self._timeout_s, f"finish version {version}")
        assert self.transport is not None
        compared = encoder is not None and not full and encoder.compared
        return {
            "version": version,
            "transport": self.transport,
            "delta": not full,
            "buckets": count,
            "full_bytes": full_bytes,
            "sent_bytes": sent_bytes,
            "changed": encoder.changed / encoder.compared if encoder is not None and compared else None,
            "resent_buckets": resent,
        }

    def _resend_wanted(self, count: int, version: int) -> bool:
        """Wait until every receiver has the first ``count`` buckets; return True if one requests the last again."""
        awaited = f"take bucket {count} of version {version}" if count else f"request version {version}"
        return any("again" in answer for answer in gather(self._channels, self._timeout_s, awaited))

    def _send_bucket(self, payload: Payload, index: int, version: int) -> int:
        assert self._end is not None
        entries = [entry.to_json() for entry in payload.entries]
        self._send_to_all({"bucket": index, "entries": entries, "checksum": payload.checksum})
        self._end.send(payload, f"bucket {index + 1} of version {version}")
        return payload.nbytes

    def _send_to_all(self, message: dict[str, Any]) -> None:
        for channel in self._channels:
            channel.send(message, self._timeout_s)

    def _report_failure(self, error: BaseException) -> None:
        for channel in self._channels:
            try:
                channel.send({"failed": f"{type(error).__name__}: {error}"}, timeout_s=1)
            except TransferError:  # this receiver may be the one that died
                continue


def open_sender(
    transport: Transport | Literal["auto"] = "auto",
    *,
    receivers: int,
    host: str = "127.0.0.1",
    timeout_s: float = 60,
    bucket_bytes: int = 512 << 20,
    delta: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[WeightSender, Address]:
    """Listen for receivers, in the trainer's first rank, without waiting for them.

    Args:
        transport: how the bytes travel; "auto" chooses the fastest transport that works for all processes.
        receivers: number of receivers.
        host: address of this machine that the receivers can reach; the sender listens on no other. Bytes are not
            encrypted.
        timeout_s: timeout of each wait, in seconds: for a connection, the export of a bucket, the transfer of a piece
            of it, its loading.
        bucket_bytes: size of the buckets that will be sent. A quarter of it is allocated for staging.
        delta: keep a copy of the weights on the host (here and in every receiver), and send only changed elements.
        device: device of the sent tensors.

    Raises:
        ValueError: an argument is out of range; the message names it.
        OSError: ``host`` is not an address of this machine.
    """
    if receivers < 1:
        raise ValueError(f"receivers must be at least 1, not {receivers}")
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be at least 1, not {bucket_bytes}")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s must be positive, not {timeout_s}")
    if transport not in ("auto", "gloo", "nccl", "shm", "ipc"):
        raise ValueError(f"transport must be auto, gloo, nccl, shm or ipc, not {transport!r}")
    if host in ("", "0.0.0.0", "::"):
        raise ValueError(f"host must be one address that the receivers can reach, not {host!r} (all of this machine)")
    device = torch.device(device)
    if transport in ("nccl", "ipc") and device.type != "cuda":
        raise ValueError(f"the transport {transport} moves tensors on CUDA devices, not on {device}; use auto")
    listener = socket.create_server((host, 0), backlog=receivers + 16)
    address = Address(host, listener.getsockname()[1], receivers, timeout_s, secrets.token_hex(16))
    return WeightSender(listener, address, transport, bucket_bytes, delta, device), address


def _ranks_text(ranks: list[int], count: int) -> str:
    return f"receiver{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {count}"
