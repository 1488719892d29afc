"""Weight transfer from a training engine to rollout engines in other processes.

One process of the trainer opens a sender (`open_sender`), each rollout process a receiver (`open_receiver`). A version
of the weights travels as a stream of buckets, each at most ``bucket_bytes`` large; a transport moves the bytes of a
bucket:

========= ===============================================================
``shm``   shared memory, between processes of one host
``ipc``   CUDA IPC, between processes that use one GPU
``nccl``  broadcast between GPUs
``gloo``  broadcast over TCP, between any processes
========= ===============================================================

Neither Ray nor the default process group takes part. With ``delta=True`` only changed elements are sent
(`rlcore_kit.weight_transfer.delta`).
"""

from rlcore_kit.weight_transfer.address import Address
from rlcore_kit.weight_transfer.channel import TransferError
from rlcore_kit.weight_transfer.receiver import WeightReceiver, open_receiver
from rlcore_kit.weight_transfer.sender import TransferStats, WeightSender, open_sender
from rlcore_kit.weight_transfer.transport_choice import Transport

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
