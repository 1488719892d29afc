"""Transport ``shm``: slots in shared memory, between processes of one host.

The memory has no name (``memfd_create``): nothing has to be unlinked, and however the processes end, the kernel frees
it with the last of them. The size of ``/dev/shm``, 64 MiB in many containers, is no limit either. Receivers open the
memory as the sender's ``/proc/PID/fd``, so all processes must share a process namespace and a user.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlcore_kit.weight_transfer.channel import Channel, TransferError
from rlcore_kit.weight_transfer.flat import Payload
from rlcore_kit.weight_transfer.slots import receive_through_slots, send_through_slots
from rlcore_kit.weight_transfer.transport import ReceiverEnd, SenderEnd


def host_identity() -> str:
    """Return a text that is equal in two processes if and only if they can share memory with this transport."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"


class SharedMemorySender(SenderEnd):
    """The sender's end of the transport ``shm``."""

    def __init__(self, channels: Sequence[Channel], piece_bytes: int, timeout_s: float) -> None:
        self._channels, self._piece_bytes, self._timeout_s = channels, piece_bytes, timeout_s
        self._descriptor: int | None = os.memfd_create("rlcore-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, 2 * piece_bytes)
        memory = torch.frombuffer(mmap.mmap(self._descriptor, 2 * piece_bytes), dtype=torch.uint8)
        self._slots = [memory[:piece_bytes], memory[piece_bytes:]]

    def offer(self, rank: int) -> dict[str, Any]:
        assert self._descriptor is not None
        return {
            "path": f"/proc/{os.getpid()}/fd/{self._descriptor}",
            "inode": os.fstat(self._descriptor).st_ino,
            "piece_bytes": self._piece_bytes,
        }

    def open(self) -> None:
        return

    def opened(self) -> None:
        self._close_descriptor()

    def send(self, payload: Payload, bucket: str) -> None:
        send_through_slots(payload, bucket, self._slots, self._channels, self._timeout_s, written=lambda: None)

    def close(self) -> None:
        self._close_descriptor()
        self._slots = []

    def _close_descriptor(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class SharedMemoryReceiver(ReceiverEnd):
    """A receiver's end of the transport ``shm``."""

    device = torch.device("cpu")

    def __init__(self, offer: dict[str, Any], channel: Channel, timeout_s: float) -> None:
        self._channel, self._timeout_s = channel, timeout_s
        self._piece_bytes = offer["piece_bytes"]
        try:
            descriptor = os.open(offer["path"], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TransferError(
                f"cannot open the sender's shared memory ({error}); run sender and receiver on one host, in one "
                "container and as one user, or use the transport gloo"
            ) from error
        try:
            # Another process namespace may have another process, and another file, at this path.
            if os.fstat(descriptor).st_ino != offer["inode"]:
                raise TransferError(
                    "the sender's shared memory cannot be opened from this process namespace; use the transport gloo"
                )
            self._memory = mmap.mmap(descriptor, 2 * self._piece_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)

    def receive_into(self, flat: torch.Tensor, bucket: str) -> None:
        receive_through_slots(flat, bucket, self._piece_bytes, self._channel, self._timeout_s, self._read)

    def close(self) -> None:
        self._memory.close()

    def _read(self, slot: int, into: torch.Tensor) -> None:
        # numpy, because torch does not accept read-only memory
        np.copyto(
            into.numpy(), np.frombuffer(self._memory, np.uint8, count=into.numel(), offset=slot * self._piece_bytes)
        )
