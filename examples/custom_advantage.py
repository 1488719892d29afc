"""An advantage estimator of your own: how a completion ranks in its group, however far apart the scores are.

As a script, it is the `rlcore` command with one more estimator:

    python custom_advantage.py run grpo --config tiny.yaml reward.name=gsm8k algorithm.advantage=rank

In a package, its entry point makes the plain `rlcore` command find it, on every worker:

    [project.entry-points."rlcore.algorithms"]
    rank = "custom_advantage"
"""

import torch
from pydantic import Field

from rlcore.algorithms import Advantages, advantages
from rlcore.algorithms.sequences import per_token, sequence_sums, trained_mask
from rlcore.batch import Batch
from rlcore.config import Config


class RankParams(Config):
    margin: float = Field(0.0, ge=0, description="Scores that differ by no more than this are equal.")


@advantages.register("rank", params=RankParams)
def rank(batch: Batch, params: RankParams) -> Advantages:
    """The share of its group that a completion beats, less the share that beats it: from −1 to 1, 0 on average."""
    scores = sequence_sums(batch.flat("token_rewards"), batch.lengths)
    group = batch["group"]
    peers = group[:, None] == group
    wins = peers & (scores[:, None] - scores > params.margin)
    ranks = (wins.sum(1) - wins.sum(0)) / (peers.sum(1) - 1).clamp(min=1)
    return Advantages(torch.where(trained_mask(batch), per_token(ranks, batch.lengths), 0))


if __name__ == "__main__":
    from rlcore.cli import main

    main()
