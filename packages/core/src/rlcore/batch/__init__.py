"""The batch protocol: what flows between rollout, reward, algorithms and engines."""

from rlcore.batch.alignment import predicted_positions, predicting_states, scatter_predictions
from rlcore.batch.balance import balanced_partitions, micro_batches
from rlcore.batch.batch import Batch
from rlcore.batch.jagged import Jagged

__all__ = [
    "Batch",
    "Jagged",
    "balanced_partitions",
    "micro_batches",
    "predicted_positions",
    "predicting_states",
    "scatter_predictions",
]
