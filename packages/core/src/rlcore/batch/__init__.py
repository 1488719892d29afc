"""The batch protocol: what flows between rollout, reward, algorithms and engines."""

from rlcore.batch.alignment import state_positions, to_column, token_positions
from rlcore.batch.balance import balanced_partitions, micro_batches
from rlcore.batch.batch import Batch
from rlcore.batch.jagged import Jagged

__all__ = [
    "Batch",
    "Jagged",
    "balanced_partitions",
    "micro_batches",
    "state_positions",
    "to_column",
    "token_positions",
]
