"""Two slots of memory that a sender and its receivers see at once; transports ``shm`` and ``ipc`` stand on it.

The sender fills a slot and announces it; every receiver copies it out and says so; then the slot is filled anew. One
slot is being filled while the other is being read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rlcore_kit.weight_transfer.channel import Channel, gather
from rlcore_kit.weight_transfer.flat import Payload, PieceReader
from rlcore_kit.weight_transfer.transport import piece_ranges


def send_through_slots(
    payload: Payload,
    bucket: str,
    slots: Sequence[torch.Tensor],
    channels: Sequence[Channel],
    timeout_s: float,
    written: Callable[[], None],
) -> None:
    """Move a payload; returns when every receiver has read all of it.

    Args:
        slots: bytes ``[n]`` each, of equal length.
        written: called after a slot was filled and before it is announced; waits until the bytes are really there.
    """
    reader = PieceReader(payload)
    pieces = list(piece_ranges(payload.nbytes, slots[0].numel()))
    for index, (start, stop) in enumerate(pieces):
        if index >= len(slots):
            gather(channels, timeout_s, f"take {bucket}")
        reader.read_into(slots[index % len(slots)][: stop - start])
        written()
        for channel in channels:
            channel.send({"piece": index}, timeout_s)
    for _ in range(min(len(slots), len(pieces))):
        gather(channels, timeout_s, f"take {bucket}")


def receive_through_slots(
    flat: torch.Tensor,
    bucket: str,
    slot_bytes: int,
    channel: Channel,
    timeout_s: float,
    read: Callable[[int, torch.Tensor], None],
) -> None:
    """Fill ``flat``.

    Args:
        read: ``read(slot, into)`` copies the slot's first bytes and returns when the slot may be overwritten.
    """
    for index, (start, stop) in enumerate(piece_ranges(flat.numel(), slot_bytes)):
        channel.receive(timeout_s, f"send {bucket}")
        read(index % 2, flat[start:stop])
        channel.send({"took": index}, timeout_s)
