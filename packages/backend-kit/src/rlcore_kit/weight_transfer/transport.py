"""Interface of the transports, which move the bytes of buckets: a sender's end and a receiver's end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from rlcore_kit.weight_transfer.flat import Payload


class SenderEnd(Protocol):
    """Sends payloads to all receivers."""

    def offer(self, rank: int) -> dict[str, Any]:
        """Return what receiver ``rank`` needs to open its end, as JSON values."""
        ...

    def open(self) -> None:
        """Open this end, after every receiver has received its offer; may wait for the receivers."""
        ...

    def opened(self) -> None:
        """Release what only opening needed, after every receiver has opened its end."""
        ...

    def send(self, payload: Payload, bucket: str) -> None:
        """Send the payload's bytes to every receiver; ``bucket`` names the payload in errors."""
        ...

    def close(self) -> None:
        """Release all resources; idempotent."""
        ...


class ReceiverEnd(Protocol):
    """Receives payloads."""

    device: torch.device
    """Device of the buffers that `receive_into` fills."""

    def receive_into(self, flat: torch.Tensor, bucket: str) -> None:
        """Fill ``flat`` (bytes ``[n]`` on `device`) with the ``n`` bytes of the sender's `send`."""
        ...

    def close(self) -> None:
        """Release all resources; idempotent."""
        ...


def piece_ranges(nbytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the pieces, ``(start, stop)``, in which both ends move ``nbytes`` bytes."""
    for start in range(0, nbytes, piece_bytes):
        yield start, min(start + piece_bytes, nbytes)
