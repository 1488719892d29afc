"""Samples with a number that is not finite: each is taken out of the loss before it spreads to the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlcore.algorithms.sequences import per_token, trained_counts, trained_mask
from rlcore.batch import Batch, Jagged

IN_LOSS = "in_loss"
"""A dense column of bools: false for samples that were taken out. A batch of which all samples train has none."""


NOT_CHECKED = ("loss_mask", "episode_score")


def containment(batch: Batch) -> tuple[dict[str, Jagged | torch.Tensor], dict[int, str]]:
    """Return the columns that take samples with a number that is not finite out of the loss.

    Looks at the floating-point columns: at the trained tokens of per-token ones, at everything in dense ones. Such a
    sample keeps its place, so that groups and mini-batches keep their sizes. Its ``loss_mask`` becomes 0. In per-token
    columns what is not finite becomes 0; in dense ones the mean of its group's finite numbers (0 without any), so that
    a baseline is that of the other samples. Where no sample is left, nothing is changed: the optimizer skips the step,
    and many such steps end the run.

    Args:
        batch: has ``loss_mask`` and ``group``.

    Returns:
        the columns to replace; and by sample the first column in which it has such a number.
    """
    mask, lengths = trained_mask(batch), batch.lengths
    found: dict[int, str] = {}
    repaired: dict[str, Jagged | torch.Tensor] = {}
    for name, values in _floating(batch):
        odd = ~torch.isfinite(values)
        touched = odd.reshape(len(values), -1).any(1)
        per_sample = trained_counts(touched & mask, lengths) > 0 if name in batch.jagged_names else touched.cpu()
        if not per_sample.any():
            continue
        if name in batch.jagged_names:
            repaired[name] = batch.jagged(torch.where(odd, 0, values))
        else:
            repaired[name] = torch.where(odd, _group_means(values, odd, batch["group"]), values)
        for sample in per_sample.nonzero().flatten().tolist():
            found.setdefault(sample, name)
    if len(found) in (0, len(batch)):
        return {}, found
    out = torch.zeros(len(batch), dtype=torch.bool)
    out[list(found)] = True
    loss_mask = batch.flat("loss_mask").masked_fill(per_token(out.to(mask.device), lengths), 0)
    return {**repaired, "loss_mask": batch.jagged(loss_mask)}, found


def described(batch: Batch, found: dict[int, str]) -> str:
    """Return what `containment` found and does about it, in words."""
    sample, column = min(found.items())
    first = f"sample {sample} (prompt {int(batch['group'][sample])}) has a number in {column} that is not finite"
    if len(found) == len(batch):
        return f"{first}, as have all others of its batch: none can be left out of the loss"
    others = f", as have {len(found) - 1} others of its batch" if len(found) > 1 else ""
    return f"{first}{others}; such samples are left out of the loss"


def _floating(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the columns of floating-point numbers but the mask, and their values.

    ``episode_score`` has NaN where an episode gives no score: what the reward made of it is in ``score``.
    """
    for name in batch.names:
        values = batch.flat(name) if name in batch.jagged_names else batch[name]
        if isinstance(values, torch.Tensor) and values.is_floating_point() and name not in NOT_CHECKED:
            yield name, values


def _group_means(values: torch.Tensor, odd: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return the mean of each sample's group in ``values`` ``[B, ...]`` over what is not ``odd``; 0 where all is."""
    index = torch.unique(group, return_inverse=True)[1]
    counts = torch.zeros_like(values).index_add_(0, index, (~odd).to(values.dtype))
    sums = torch.zeros_like(values).index_add_(0, index, torch.where(odd, 0, values))
    return (sums / counts.clamp(min=1))[index]
