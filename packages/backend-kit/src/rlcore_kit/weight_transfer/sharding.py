"""Cutting full tensors into tensor-parallel shards on the receiving side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rlcore.engines.weight_bucket import WeightBucket


@dataclass(frozen=True)
class ShardRule:
    """Tensors whose name matches ``pattern`` (as in `fnmatch`) are cut along ``dim``."""

    pattern: str
    dim: int


def shard(bucket: WeightBucket, rules: Sequence[ShardRule], rank: int, size: int) -> WeightBucket:
    """Rank ``rank``'s share of every tensor, of ``size`` equal ones; the first rule that matches counts.

    A tensor that no rule matches is replicated. Shares are copies: the full tensors can go.

    Raises:
        ValueError: a dimension is missing, or not a multiple of ``size``.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank must be in [0, {size}), not {rank}")
    tensors = []
    for name, tensor in bucket.tensors:
        rule = next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)
        if rule is not None:
            if not -tensor.dim() <= rule.dim < tensor.dim() or tensor.shape[rule.dim] % size:
                raise ValueError(
                    f"{name} of shape {tuple(tensor.shape)} cannot be cut into {size} equal parts along dimension "
                    f"{rule.dim} (rule {rule.pattern!r})"
                )
            tensor = tensor.chunk(size, rule.dim)[rank].clone()
        tensors.append((name, tensor))
    return WeightBucket(tuple(tensors))
