"""Which part of a Megatron parameter is a tensor of a Hugging Face model folder.

Megatron fuses tensors that are separate in transformers: query, key and value of a layer are one matrix, whose rows are
ordered by query group (the queries of a group, its key, its value, then the next group), and the gate and up
projections are one matrix, gate first. Tensor parallelism divides a fused matrix so that every process holds the *same*
share of each of its parts: an integer number of query groups, the same rows of gate and up. So a process's share of a
Hugging Face tensor is one slice of it, and `view` returns the part of the process's matrix that is this slice. Loading
writes to this view and exporting reads from it, so that one is the inverse of the other for every family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Part = Literal["entire", "query", "key", "value", "gate", "up"]


@dataclass(frozen=True)
class Weight:
    """One tensor of the model folder, or one in each layer, or one for each expert in each layer.

    Attributes:
        hf: name in the model folder, with ``{layer}`` and ``{expert}`` where they apply.
        megatron: name in Megatron's model (of its "local" layers), with the same fields.
        part: which part of the Megatron tensor it is.
        split: the dimension that tensor parallelism divides; None for tensors that are full on every process.
        vocabulary: whether dimension 0 is the vocabulary, which Megatron may pad.
    """

    hf: str
    megatron: str
    part: Part = "entire"
    split: int | None = None
    vocabulary: bool = False

    @property
    def per_expert(self) -> bool:
        """Whether there is one tensor for each expert."""
        return "{expert}" in self.hf


@dataclass(frozen=True)
class Heads:
    """Attention heads of a layer: ``per_group`` query heads share a key and a value head of ``width`` elements."""

    per_group: int
    width: int


def view(tensor: torch.Tensor, part: Part, heads: Heads) -> torch.Tensor:
    """Return the elements of ``tensor`` (one process's share of a Megatron parameter) that are ``part``.

    Returns:
        a view that holds the share of the Hugging Face tensor in its order: queries as
        ``[groups, per_group, width, …]``, keys and values as ``[groups, width, …]``, all else as it is.
    """
    if part == "entire":
        return tensor
    if part in ("gate", "up"):
        half = len(tensor) // 2
        return tensor.narrow(0, half * (part == "up"), half)
    grouped = tensor.view(-1, heads.per_group + 2, heads.width, *tensor.shape[1:])
    if part == "query":
        return grouped[:, : heads.per_group]
    return grouped[:, heads.per_group + (part == "value")]


def share_shape(shape: torch.Size, part: Part, heads: Heads) -> torch.Size:
    """Return the shape of a process's share of a Hugging Face tensor, for a Megatron parameter of ``shape``."""
    if part == "entire":
        return shape
    if part in ("gate", "up"):
        return torch.Size((shape[0] // 2, *shape[1:]))
    groups = shape[0] // ((heads.per_group + 2) * heads.width)
    count = heads.per_group if part == "query" else 1
    return torch.Size((groups * count * heads.width, *shape[1:]))
