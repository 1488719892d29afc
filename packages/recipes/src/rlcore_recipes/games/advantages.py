"""Advantages of self-play."""

from __future__ import annotations

import torch

from rlcore.algorithms.registries import Advantages, advantages
from rlcore.algorithms.sequences import per_token, trained_mask
from rlcore.batch import Batch
from rlcore.config.registry import NoParams
from rlcore_recipes.games.turns import players


@advantages.register("role_conditioned", required_columns={"score"}, traits={"compares_group"})
def role_conditioned(batch: Batch, params: NoParams) -> Advantages:
    """Return s − μ on the first player's tokens and μ − s on the second's; μ is the mean score of the group.

    s is the first player's score, and 1 − s the second's: each player's score is compared with the mean that the same
    player had in the games from the same state.

    Source: role-conditioned advantage estimation, SPIRAL, Liu et al. 2025, arXiv:2506.24119, which takes a moving
    average over all games as each player's baseline.
    """
    scores, (_, group) = batch["score"].double(), batch["group"].unique(return_inverse=True)
    deviation = scores - (group.bincount(weights=scores) / group.bincount())[group]
    sign = 1 - 2 * players(batch)
    return Advantages(torch.where(trained_mask(batch), sign * per_token(deviation, batch.lengths), 0).float())
