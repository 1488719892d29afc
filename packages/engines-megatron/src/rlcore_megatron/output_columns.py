"""The outputs of a forward pass as one tensor, which passes through Megatron's schedules and between stages.

All are fp32 there: token ids too, which fp32 holds exactly up to 2^24.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlcore.engines import ForwardRequest
from rlcore.engines.train import Output


def output_widths(request: ForwardRequest, columns: Mapping[str, torch.Tensor], hidden_size: int) -> dict[Output, int]:
    """Return the number of entries per token of each output; 0 is one entry, without a dimension.

    Args:
        columns: ``request.columns`` of the batch, ``[T, ...]``.
    """
    several = {
        "candidate_logprobs": columns[request.candidates].shape[-1] if request.candidates is not None else 0,
        "top_ids": request.top_k,
        "top_logprobs": request.top_k,
        "states": hidden_size,
    }
    return {name: several.get(name, 0) for name in request.outputs}


def total_width(widths: Mapping[Output, int]) -> int:
    """Return the number of entries per token of all outputs."""
    return sum(width or 1 for width in widths.values())


def separated(values: torch.Tensor, widths: Mapping[Output, int]) -> dict[str, torch.Tensor]:
    """Return the columns that are next to each other in ``values`` ``[T, total width]``."""
    parts = values.split([width or 1 for width in widths.values()], -1)
    return {str(name): part if width else part[:, 0] for (name, width), part in zip(widths.items(), parts)}
