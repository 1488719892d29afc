"""The base model of a checkpoint that holds adapters alone: how it is recorded and compared."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import Field

from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint.json_file import Finite, JsonFile

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Lora(JsonFile):
    """Rank and scale of adapters."""

    rank: int = Field(ge=1, description="Rank of the adapters.")
    alpha: Finite = Field(gt=0, description="Scale of the adapters times their rank.")


class Frozen(JsonFile):
    """Fingerprint of the frozen weights, which are not in the checkpoint."""

    dtype: str = Field(description="Precision in which the fingerprint was computed.")
    number: str = Field(
        pattern="^[0-9a-f]{16}$", description="Sum of the bits of all weights, see `rlcore_kit.checkpoint.base_model`."
    )


def sum_of_bits(tensors: Iterable[torch.Tensor]) -> int:
    """Return the sum of the elements' bits as integers, modulo 2^64: the same however a model is divided over ranks."""
    total = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
        total += int(bits.sum(dtype=torch.int64))
    return total % 2**64


def frozen(dtype: torch.dtype, sums: Iterable[int]) -> Frozen:
    """Return the fingerprint of weights of ``dtype`` with the ranks' ``sums`` of bits."""
    return Frozen(dtype=str(dtype), number=f"{sum(sums) % 2**64:016x}")


def check_base_model(
    path: Path, theirs: tuple[Lora | None, Frozen | None], ours: tuple[Lora | None, Frozen | None]
) -> None:
    """Compare the adapters and frozen weights of the checkpoint ``path`` with those of an engine.

    Raises:
        CheckpointError: one of them trains all weights and the other adapters, or the adapters have another rank, scale
            or base model.
    """
    if theirs[0] != ours[0]:
        there, here = (_described(lora) for lora in (theirs[0], ours[0]))
        raise CheckpointError(f"{path} was saved by an engine that trains {there}; this one trains {here}")
    there_frozen, here_frozen = theirs[1], ours[1]
    comparable = there_frozen is not None and here_frozen is not None and there_frozen.dtype == here_frozen.dtype
    if comparable and there_frozen != here_frozen:
        raise CheckpointError(f"{path} holds adapters of another base model than model.path")


def _described(lora: Lora | None) -> str:
    return "all weights" if lora is None else f"adapters of rank {lora.rank} and alpha {lora.alpha:g}"
