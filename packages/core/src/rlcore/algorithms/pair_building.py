"""Pairs of a better and a worse completion of a prompt, for preference losses on the policy's own samples."""

from __future__ import annotations

import torch
from pydantic import Field

from rlcore.algorithms.registries import pair_builders
from rlcore.config import Config


class GapParams(Config):
    """Parameters of pair builders."""

    min_gap: float = Field(0.0, ge=0, description="The scores of a pair differ by more than this.")


@pair_builders.register("best-worst", params=GapParams)
def best_worst(scores: torch.Tensor, group: torch.Tensor, params: GapParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the best sample of each group with the worst; of equal scores the first. Groups of one score give none.

    Source: online DPO, Guo et al. 2024, arXiv:2402.04792; iterative RPO, Pang et al. 2024, arXiv:2404.19733.
    """
    pairs = []
    for members in _groups(group):
        best, worst = members[scores[members].argmax()], members[scores[members].argmin()]
        if scores[best] - scores[worst] > params.min_gap:
            pairs.append((int(best), int(worst)))
    return _rows(pairs)


@pair_builders.register("all-pairs", params=GapParams)
def all_pairs(scores: torch.Tensor, group: torch.Tensor, params: GapParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare every two samples of a group whose scores differ.

    Source: RRHF, Yuan et al. 2023, arXiv:2304.05302 (ranking of all samples of a prompt).
    """
    pairs = []
    for members in _groups(group):
        better = scores[members, None] - scores[None, members] > params.min_gap
        pairs += [(int(members[row]), int(members[other])) for row, other in better.nonzero().tolist()]
    return _rows(pairs)


def _groups(group: torch.Tensor) -> list[torch.Tensor]:
    """Return the rows of each group."""
    order = group.argsort(stable=True)
    _, counts = torch.unique(group, return_counts=True)
    return list(torch.split(order, counts.tolist())) if len(group) else []


def _rows(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]
