"""Moving weights from a trainer into rollout engines of other processes, without Ray and without the default group."""

from rlcore_kit.weight_transfer.address import Address
from rlcore_kit.weight_transfer.channel import TransferError
from rlcore_kit.weight_transfer.choice import Transport
from rlcore_kit.weight_transfer.receiver import WeightReceiver, open_receiver
from rlcore_kit.weight_transfer.sender import TransferStats, WeightSender, open_sender

__all__ = [
    "Address",
    "TransferError",
    "TransferStats",
    "Transport",
    "WeightReceiver",
    "WeightSender",
    "open_receiver",
    "open_sender",
]
