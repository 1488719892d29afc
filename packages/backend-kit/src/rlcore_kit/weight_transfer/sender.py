"""The trainer's first rank: `open_sender`, then `WeightSender.send` for every version.

Protocol, all messages by the receivers' control connections: *begin* with a version, answered by the version that each
receiver holds; then, whenever all are *ready*, a *bucket*, whose bytes go by the transport; *end*, answered by *done*.
In delta mode a receiver may ask for a bucket *again*; it is sent to all, whole, before the next one.
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
from rlcore_kit.weight_transfer.channel import MOST_BYTES, Channel, TransferError, gather
from rlcore_kit.weight_transfer.choice import Facts, Transport, choose, facts_here
from rlcore_kit.weight_transfer.cuda_ipc import CudaIpcSender
from rlcore_kit.weight_transfer.delta import DeltaEncoder
from rlcore_kit.weight_transfer.flat import Payload, pack
from rlcore_kit.weight_transfer.shared_memory import SharedMemorySender
from rlcore_kit.weight_transfer.transport import SenderEnd


@dataclass(frozen=True)
class TransferStats:
    """What one `WeightSender.send` did.

    Attributes:
        transport: by which the bytes went.
        delta: only what had changed was sent.
        buckets: how many.
        full_bytes: size of the weights.
        sent_bytes: bytes given to the transport, once for all receivers.
        changed: share of the elements whose bits had changed; None if they were not compared.
        resent_buckets: buckets that did not pass a receiver's checksum and were sent again, whole.
        seconds: from the call to the last receiver's word that it has everything; the export is included.
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
        """``sent_mb`` (MiB), ``delta`` (1 if only changes went), ``resent_buckets`` and, where known, ``changed``."""
        found = Metrics()
        found.sum("sent_mb", self.sent_bytes / 2**20)
        found.mean("delta", float(self.delta))
        found.sum("resent_buckets", self.resent_buckets)
        if self.changed is not None:
            found.mean("changed", self.changed)
        return found


class WeightSender:
    """Gives weights to a fixed set of receivers; see `open_sender`.

    After an error, and after `close`, it is of no use any more: open another one.
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
        self._address, self._wanted, self._device = address, transport, device
        # The trainer's bucket (and the tensor after it, which it may have made already), two pieces for staging, and
        # encoded blocks of at most half a bucket: together no more than two buckets.
        self._piece_bytes = max(bucket_bytes // 8, 1)
        self._encoder = DeltaEncoder(most_new_bytes=bucket_bytes // 2) if delta else None
        self._channels: list[Channel] = []
        self._end: SenderEnd | None = None
        self._closed = False
        self._timeout_s = address.timeout_s
        self.transport: Transport | None = None if transport == "auto" else transport

    def send(self, buckets: Iterable[WeightBucket], version: int) -> TransferStats:
        """Give all ``buckets`` to all receivers as ``version``.

        The buckets are taken to their end whatever happens: the trainer's other ranks take part in their making.

        Raises:
            TransferError: a receiver died, failed, or was not there in time; the message names it. All receivers that
                still live are told. The sender is closed.
        """
        start = time.monotonic()
        iterator = iter(buckets)
        try:
            stats = self._send(iterator, version)
        except BaseException as error:
            self._tell_failure(error)
            self.close()
            if isinstance(error, Exception):
                for _ in iterator:
                    pass
            raise
        return TransferStats(**stats, seconds=time.monotonic() - start)

    def connect(self) -> None:
        """Wait for all receivers; the first `send` does it too.

        Raises:
            TransferError: a receiver did not come in time, or cannot use the transport.
        """
        if self._closed:
            raise TransferError("this sender is closed; open a new one, and new receivers")
        if self._end is not None:
            return
        try:
            self._accept()
        except BaseException as error:
            self._tell_failure(error)
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
        arrived: dict[int, tuple[Channel, Facts]] = {}
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
                # A stranger may not hold up the others: a receiver speaks at once.
                hello = channel.receive(max(min(deadline - time.monotonic(), 5), 0.001), "say who it is")
                if not hmac.compare_digest(str(hello.get("token")), self._address.token):
                    raise channel.failure("no token of ours")
                rank, facts = int(hello["rank"]), Facts(**hello["facts"])
                if rank not in missing:
                    raise channel.failure(f"there is a receiver {rank} already, or none is expected")
            except (TransferError, KeyError, TypeError, ValueError):
                channel.close()
                continue
            channel.rank, channel.peer = rank, f"receiver {rank} of {count}"
            channel.most_bytes = MOST_BYTES
            arrived[rank] = channel, facts
        self._channels = [arrived[rank][0] for rank in range(count)]
        self._listener.close()
        self._listener = None
        self._open([arrived[rank][1] for rank in range(count)])

    def _open(self, receivers: list[Facts]) -> None:
        if self._wanted == "auto":
            self.transport = choose(facts_here(self._device), receivers, self._encoder is not None)
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
        gather(self._channels, self._timeout_s, f"open its end of the transport {self.transport}")
        self._end.opened()

    def _send(self, buckets: Iterator[WeightBucket], version: int) -> dict[str, Any]:
        self.connect()
        assert self._end is not None
        self._tell({"begin": version})
        answers = gather(self._channels, self._timeout_s, f"begin to take version {version}")
        encoder = self._encoder
        whole = True
        if encoder is not None:
            base = encoder.base
            whole = base is None or any(answer["holds"] != list(base) for answer in answers)
            encoder.begin()
        count = full_bytes = sent_bytes = resent = 0
        names: list[str] = []
        while True:
            bucket = next(buckets, None)
            if bucket is not None:
                full_bytes += bucket.nbytes
                payload = pack(bucket) if encoder is None else encoder.encode(bucket, whole)
                bucket = None  # a whole bucket must not outlive its sending in this frame
            else:
                payload = None
            if self._resend_wanted(count, version):
                assert encoder is not None
                again = encoder.whole(names)
                sent_bytes += self._give(again, count - 1, version)
                resent += 1
                if self._resend_wanted(count, version):
                    raise TransferError(f"bucket {count} of version {version} arrived damaged twice")
                del again
            if payload is None:
                break
            names = [entry.name for entry in payload.entries]
            sent_bytes += self._give(payload, count, version)
            del payload
            count += 1
        self._tell({"end": version, "base": None if encoder is None else encoder.finish(version)})
        gather(self._channels, self._timeout_s, f"finish version {version}")
        assert self.transport is not None
        compared = encoder is not None and not whole and encoder.compared
        return {
            "version": version,
            "transport": self.transport,
            "delta": not whole,
            "buckets": count,
            "full_bytes": full_bytes,
            "sent_bytes": sent_bytes,
            "changed": encoder.changed / encoder.compared if encoder is not None and compared else None,
            "resent_buckets": resent,
        }

    def _resend_wanted(self, count: int, version: int) -> bool:
        """Wait until every receiver is done with the first ``count`` buckets."""
        awaited = f"take bucket {count} of version {version}" if count else f"ask for version {version}"
        return any("again" in answer for answer in gather(self._channels, self._timeout_s, awaited))

    def _give(self, payload: Payload, index: int, version: int) -> int:
        assert self._end is not None
        entries = [entry.to_json() for entry in payload.entries]
        self._tell({"bucket": index, "entries": entries, "checksum": payload.checksum})
        self._end.send(payload, f"bucket {index + 1} of version {version}")
        return payload.nbytes

    def _tell(self, message: dict[str, Any]) -> None:
        for channel in self._channels:
            channel.send(message, self._timeout_s)

    def _tell_failure(self, error: BaseException) -> None:
        for channel in self._channels:
            try:
                channel.send({"failed": f"{type(error).__name__}: {error}"}, timeout_s=1)
            except TransferError:  # it may be the very one that is gone
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
    """Listen for receivers, in the trainer's first rank; waits for nobody.

    Args:
        host: this machine's address that the receivers can reach; nothing listens anywhere else. Bytes go unencrypted.
        timeout_s: longest wait for any one thing: a connection, the next bucket's export, the transfer of a piece of
            it, its loading.
        bucket_bytes: of the buckets that will be sent. A quarter of it is allocated for staging.
        delta: keep a copy of the weights on the host (here and in every receiver), and send only what changed.
        device: where the sent tensors are.

    Raises:
        ValueError: nonsense in an argument.
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
        raise ValueError("host must be one address that the receivers can reach, not all of this machine's")
    device = torch.device(device)
    if transport in ("nccl", "ipc") and device.type != "cuda":
        raise ValueError(f"the transport {transport} moves tensors on CUDA devices, not on {device}")
    listener = socket.create_server((host, 0), backlog=receivers + 16)
    address = Address(host, listener.getsockname()[1], receivers, timeout_s, secrets.token_hex(16))
    return WeightSender(listener, address, transport, bucket_bytes, delta, device), address


def _ranks_text(ranks: list[int], count: int) -> str:
    return f"receiver{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {count}"
