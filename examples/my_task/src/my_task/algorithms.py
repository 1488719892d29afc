"""The estimator and the loss. The entry point imports this module, which registers both."""

import torch
from pydantic import Field

from rlcore.algorithms import Advantages, PolicyLossInputs, advantages, policy_losses
from rlcore.algorithms.sequences import per_token, sequence_sums, trained_mask
from rlcore.batch import Batch
from rlcore.config import Config
from rlcore.config.registry import NoParams
from rlcore.metrics import Metrics


def group_mean(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``values`` over the group of each sample, `[B]` fp64."""
    index = group.unique(return_inverse=True)[1]
    return (index.bincount(weights=values) / index.bincount())[index]


@advantages.register("mean_deviation", traits={"compares_group"})
def mean_deviation(batch: Batch, params: NoParams) -> Advantages:
    """(s − μ) / (mean of |s − μ| + 1e-6) over the group: less moved by one extreme score than GRPO's σ."""
    scores, group = sequence_sums(batch.flat("token_rewards"), batch.lengths), batch["group"]
    deviation = scores - group_mean(scores, group)
    scaled = deviation / (group_mean(deviation.abs(), group) + 1e-6)
    return Advantages(torch.where(trained_mask(batch), per_token(scaled, batch.lengths), 0).float())


class FocalParams(Config):
    gamma: float = Field(2.0, ge=0, description="0 weighs all prompts equally.")


@policy_losses.register(
    "focal", params=FocalParams, required_columns={"solve_rate"}, traits={"vanishes_with_advantage"}
)
def focal(inputs: PolicyLossInputs, params: FocalParams) -> tuple[torch.Tensor, Metrics]:
    """−(1 − solve rate)^γ · A · logπ per token `[T]`, with the recipe's column ``solve_rate`` `[B]`."""
    weights = per_token((1 - inputs.columns["solve_rate"]) ** params.gamma, inputs.lengths)
    return -weights * inputs.advantages * inputs.logprobs, Metrics()
