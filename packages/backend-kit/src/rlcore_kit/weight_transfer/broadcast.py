"""Transports ``gloo`` and ``nccl``: pieces of a bucket are broadcast in a separate process group.

The process group has a separate store and is not registered with torch.distributed: the default group belongs to the
trainer. The store listens on the sender's host only, and each process of a gloo group on the address that it connected
from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from rlcore_kit.weight_transfer import process_group
from rlcore_kit.weight_transfer.channel import Channel, TransferError, wait_until
from rlcore_kit.weight_transfer.flat import Payload, PieceReader
from rlcore_kit.weight_transfer.transport import ReceiverEnd, SenderEnd, piece_ranges

# `wait_until` should time out before gloo does: its error names the peer.
_GRACE_S = 2.0
# NCCL's watchdog ends the process when a collective exceeds the group's timeout: it must never be the first to expire.
_NCCL_TIMEOUT_FACTOR = 10


class BroadcastSender(SenderEnd):
    """Rank 0 of the process group. Of two staging buffers one is filled while the other is broadcast."""

    def __init__(
        self,
        backend: str,
        host: str,
        channels: Sequence[Channel],
        piece_bytes: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._backend, self._host, self._channels = backend, host, channels
        self._piece_bytes, self._device, self._timeout_s = piece_bytes, device, timeout_s
        self._store, self._port = process_group.listening_store(host, timeout_s)
        self._group: Any = None
        self._slots: list[torch.Tensor] = []

    def offer(self, rank: int) -> dict[str, Any]:
        return {"port": self._port, "size": len(self._channels) + 1, "piece_bytes": self._piece_bytes}

    def open(self) -> None:
        assert self._store is not None
        try:
            self._group = _group(
                self._backend, self._store, 0, len(self._channels) + 1, self._host, self._device, self._timeout_s
            )
        except RuntimeError as error:
            raise _with_peer(error, self._channels, f"join the {self._backend} group") from error
        self._slots = [torch.empty(self._piece_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]

    def opened(self) -> None:
        return

    def send(self, payload: Payload, bucket: str) -> None:
        reader = PieceReader(payload)
        works: list[Any] = [None, None]
        for index, (start, stop) in enumerate(piece_ranges(payload.nbytes, self._piece_bytes)):
            slot = self._slots[index % 2]
            _finish(works[index % 2], self._channels, self._timeout_s, f"take {bucket}")
            reader.read_into(slot[: stop - start])
            works[index % 2] = process_group.broadcast(self._group, slot[: stop - start])
        for work in works:
            _finish(work, self._channels, self._timeout_s, f"take {bucket}")

    def close(self) -> None:
        _abort(self._group)
        self._group, self._store, self._slots = None, None, []


class BroadcastReceiver(ReceiverEnd):
    """Another rank of the process group. Pieces arrive in the target buffer, without staging."""

    def __init__(
        self,
        backend: str,
        host: str,
        rank: int,
        offer: dict[str, Any],
        channel: Channel,
        own_host: str,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._channel, self._timeout_s = channel, timeout_s
        self._piece_bytes = offer["piece_bytes"]
        self.device = device if backend == "nccl" else torch.device("cpu")
        try:
            self._store: Any = process_group.connected_store(host, offer["port"], timeout_s)
            self._group: Any = _group(backend, self._store, rank + 1, offer["size"], own_host, self.device, timeout_s)
        except RuntimeError as error:
            raise _with_peer(error, [channel], f"join the {backend} group") from error

    def receive_into(self, flat: torch.Tensor, bucket: str) -> None:
        for start, stop in piece_ranges(flat.numel(), self._piece_bytes):
            _finish(
                process_group.broadcast(self._group, flat[start:stop]),
                [self._channel],
                self._timeout_s,
                f"send {bucket}",
            )

    def close(self) -> None:
        _abort(self._group)
        self._group = self._store = None


def _group(backend: str, store: Any, rank: int, size: int, host: str, device: torch.device, timeout_s: float) -> Any:
    store = process_group.prefixed(store, f"weights-{backend}")
    if backend == "nccl":
        with torch.cuda.device(device):
            return process_group.nccl_group(store, rank, size, timeout_s * _NCCL_TIMEOUT_FACTOR)
    return process_group.gloo_group(store, rank, size, host, timeout_s + _GRACE_S)


def _finish(work: Any, channels: Sequence[Channel], timeout_s: float, awaited: str) -> None:
    if work is None:
        return
    wait_until(work.is_completed, channels, timeout_s, awaited)
    try:
        work.wait()
    except RuntimeError as error:
        raise _with_peer(error, channels, awaited) from error


def _with_peer(error: RuntimeError, channels: Sequence[Channel], awaited: str) -> TransferError:
    """Find the peer that caused ``error``: its control connection closes at about the same moment."""
    end = time.monotonic() + _GRACE_S
    try:
        wait_until(lambda: time.monotonic() > end, channels, 2 * _GRACE_S, awaited)
    except TransferError as named:
        return named
    peers = " or ".join(channel.peer for channel in channels)
    return TransferError(f"{peers} did not {awaited}: {error}")


def _abort(group: Any) -> None:
    if group is not None:
        group.abort()
