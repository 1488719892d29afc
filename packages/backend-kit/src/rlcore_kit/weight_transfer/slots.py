"""Two slots of memory that a sender shares with its receivers; the base of the transports ``shm`` and ``ipc``.

The sender fills a slot and announces it; every receiver copies the slot and confirms; then the sender reuses the slot.
The sender fills one slot while receivers read the other.
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
    """Send a payload; return when every receiver has read all of it.

    Args:
        bucket: name of the payload in errors.
        slots: bytes ``[n]`` each, of equal length.
        channels: connections to the receivers.
        timeout_s: timeout of each wait, in seconds.
        written: called after a slot was filled and before it is announced; waits until the bytes are in memory.
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
    """Fill ``flat`` (bytes ``[n]``) with the payload that the sender sends.

    Args:
        bucket: name of the payload in errors.
        slot_bytes: length of a slot.
        read: ``read(slot, into)`` copies the slot's first bytes and returns when the slot may be overwritten.
    """
    for index, (start, stop) in enumerate(piece_ranges(flat.numel(), slot_bytes)):
        channel.receive(timeout_s, f"send {bucket}")
        read(index % 2, flat[start:stop])
        channel.send({"took": index}, timeout_s)
