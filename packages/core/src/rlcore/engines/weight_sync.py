"""Moving weights from a training engine into a rollout engine."""

from __future__ import annotations

from collections.abc import Iterator

from rlcore.engines.rollout import RolloutEngine
from rlcore.engines.train import TrainEngine
from rlcore.engines.weight_bucket import WeightBucket


def sync_weights(trainer: TrainEngine, rollout: RolloutEngine, version: int, bucket_bytes: int = 512 << 20) -> None:
    """Make ``rollout`` generate with the trainer's current weights and label them ``version``.

    A rollout that generates with the trainer's own tensors only takes the version; otherwise buckets are streamed, of
    full weights or, for a rollout that holds the frozen ones, of adapters.
    """
    if rollout.shares_weights:
        rollout.update_weights((), version)
    else:
        rollout.update_weights(export(trainer, bucket_bytes, adapters=rollout.takes_adapters), version)


def export(trainer: TrainEngine, bucket_bytes: int, *, adapters: bool) -> Iterator[WeightBucket]:
    """Stream what a rollout takes: the trainer's adapters alone, or its full weights."""
    return trainer.export_adapters(bucket_bytes) if adapters else trainer.export_weights(bucket_bytes)
