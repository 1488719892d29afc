"""Moving weights from a trainer into rollout engines of other processes, without Ray and without the default group."""

from rlcore.weight_transfer.address import Address
from rlcore.weight_transfer.channel import TransferError
from rlcore.weight_transfer.choice import Transport
from rlcore.weight_transfer.receiver import WeightReceiver, open_receiver
from rlcore.weight_transfer.sender import TransferStats, WeightSender, open_sender
from rlcore.weight_transfer.sharding import ShardRule, shard

__all__ = [
    "Address",
    "ShardRule",
    "TransferError",
    "TransferStats",
    "Transport",
    "WeightReceiver",
    "WeightSender",
    "open_receiver",
    "open_sender",
    "shard",
]
