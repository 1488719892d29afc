"""What moves the bytes of a bucket: the two ends that every transport implements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from rlcore_kit.weight_transfer.flat import Payload


class SenderEnd(Protocol):
    """Gives payloads to all receivers."""

    def offer(self, rank: int) -> dict[str, Any]:
        """What receiver ``rank`` needs to open its end, as JSON values."""
        ...

    def open(self) -> None:
        """Called after every receiver has got its offer; may wait for them."""
        ...

    def opened(self) -> None:
        """Called when every receiver has opened its end."""
        ...

    def send(self, payload: Payload, bucket: str) -> None:
        """Give the payload's bytes to every receiver. ``bucket`` names it in errors."""
        ...

    def close(self) -> None:
        """Let go of everything; idempotent."""
        ...


class ReceiverEnd(Protocol):
    """Takes payloads."""

    @property
    def device(self) -> torch.device:
        """Where `receive_into` wants its buffers."""
        ...

    def receive_into(self, flat: torch.Tensor, bucket: str) -> None:
        """Fill ``flat`` (bytes ``[n]`` on `device`) with what the sender's `send` of ``n`` bytes gave."""
        ...

    def close(self) -> None:
        """Let go of everything; idempotent."""
        ...


def piece_ranges(nbytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """The pieces, ``(start, stop)``, in which both ends move ``nbytes`` bytes."""
    for start in range(0, nbytes, piece_bytes):
        yield start, min(start + piece_bytes, nbytes)
