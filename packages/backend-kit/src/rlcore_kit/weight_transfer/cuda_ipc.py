"""Transport ``ipc``: slots in the memory of one GPU that all processes use.

The sender exports the handles of both slots once, when the connection is opened. The bytes are copied on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing import reductions

from rlcore_kit.weight_transfer.channel import Channel
from rlcore_kit.weight_transfer.flat import Payload
from rlcore_kit.weight_transfer.slots import receive_through_slots, send_through_slots
from rlcore_kit.weight_transfer.transport import ReceiverEnd, SenderEnd


class CudaIpcSender(SenderEnd):
    """The sender's end of the transport ``ipc``."""

    def __init__(self, channels: Sequence[Channel], piece_bytes: int, device: torch.device, timeout_s: float) -> None:
        self._channels, self._piece_bytes, self._device, self._timeout_s = channels, piece_bytes, device, timeout_s
        self._slots = [torch.empty(piece_bytes, dtype=torch.uint8, device=device) for _ in range(2)]

    def offer(self, rank: int) -> dict[str, Any]:
        # One handle for each receiver: torch counts the references of each handle.
        return {"piece_bytes": self._piece_bytes, "slots": [_handle(slot) for slot in self._slots]}

    def open(self) -> None:
        return

    def opened(self) -> None:
        return

    def send(self, payload: Payload, bucket: str) -> None:
        stream = torch.cuda.current_stream(self._device)
        send_through_slots(payload, bucket, self._slots, self._channels, self._timeout_s, stream.synchronize)

    def close(self) -> None:
        self._slots = []


class CudaIpcReceiver(ReceiverEnd):
    """A receiver's end of the transport ``ipc``."""

    def __init__(self, offer: dict[str, Any], channel: Channel, device: torch.device, timeout_s: float) -> None:
        self.device = device
        self._channel, self._timeout_s = channel, timeout_s
        self._piece_bytes = offer["piece_bytes"]
        self._slots = [_rebuild(fields, device) for fields in offer["slots"]]

    def receive_into(self, flat: torch.Tensor, bucket: str) -> None:
        receive_through_slots(flat, bucket, self._piece_bytes, self._channel, self._timeout_s, self._read)

    def close(self) -> None:
        self._slots = []

    def _read(self, slot: int, into: torch.Tensor) -> None:
        into.copy_(self._slots[slot][: into.numel()])
        torch.cuda.current_stream(self.device).synchronize()


# The arguments of `rebuild_cuda_tensor` that differ from slot to slot, as torch 2.11 to 2.13 name them.
_FIELDS = (
    "tensor_offset",
    "storage_handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
)


def _handle(slot: torch.Tensor) -> dict[str, Any]:
    """Return what `torch.multiprocessing` would pickle, as JSON values."""
    _, arguments = reductions.reduce_tensor(slot)  # type: ignore[no-untyped-call]
    (_, size, _, offset, _, _, _, handle, storage_bytes, storage_offset, _, counter, counter_offset, event, sync) = (
        arguments
    )
    values = (offset, handle, storage_bytes, storage_offset, counter, counter_offset, event, sync)
    fields = {
        name: value.hex() if isinstance(value, bytes) else value for name, value in zip(_FIELDS, values, strict=True)
    }
    return {"size": list(size), **fields}


def _rebuild(fields: dict[str, Any], device: torch.device) -> torch.Tensor:
    values = {name: bytes.fromhex(fields[name]) if isinstance(fields[name], str) else fields[name] for name in _FIELDS}
    slot: torch.Tensor = reductions.rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        tensor_cls=torch.Tensor,
        tensor_size=torch.Size(fields["size"]),
        tensor_stride=(1,),
        storage_cls=torch.storage.TypedStorage,
        dtype=torch.uint8,
        storage_device=device.index,  # the same GPU may have another number in the sender's process
        requires_grad=False,
        **values,
    )
    return slot
