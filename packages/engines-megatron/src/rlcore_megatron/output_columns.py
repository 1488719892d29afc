"""The outputs of a forward pass as one tensor, which passes through Megatron's schedules and between stages.

All are fp32 there: token ids too, which fp32 holds exactly up to 2^24.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rlcore.engines import ForwardRequest
from rlcore.engines.train import Output


@dataclass(frozen=True)
class OutputSizes:
    """Entries per token of outputs whose size the model decides."""

    states: int
    values: int = 1


def output_widths(
    request: ForwardRequest, columns: Mapping[str, torch.Tensor], sizes: OutputSizes
) -> dict[Output, int]:
    """Return the number of entries per token of each output; 0 is one entry, without a dimension.

    Args:
        columns: ``request.columns`` of the batch, ``[T, ...]``.
    """
    several = {
        "candidate_logprobs": columns[request.candidates].shape[-1] if request.candidates is not None else 0,
        "top_ids": request.top_k,
        "top_logprobs": request.top_k,
        "states": sizes.states,
        "values": sizes.values if sizes.values > 1 else 0,
    }
    return {name: several.get(name, 0) for name in request.outputs}


def total_width(widths: Mapping[Output, int]) -> int:
    """Return the number of entries per token of all outputs."""
    return sum(width or 1 for width in widths.values())


def separated(values: torch.Tensor, widths: Mapping[Output, int]) -> dict[str, torch.Tensor]:
    """Return the columns that are next to each other in ``values`` ``[T, total width]``."""
    parts = values.split([width or 1 for width in widths.values()], -1)
    return {str(name): part if width else part[:, 0] for (name, width), part in zip(widths.items(), parts)}
