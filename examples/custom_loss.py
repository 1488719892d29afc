"""A custom policy loss: tapered off-policy REINFORCE (TOPR; Le Roux et al., 2025, arXiv:2503.14286).

As a script, it is the `rlcore` command with one more loss:

    python custom_loss.py run grpo --config tiny.yaml reward.name=gsm8k actor.objective.policy_loss=topr

In a package, its entry point makes the plain `rlcore` command find it, on every worker:

    [project.entry-points."rlcore.algorithms"]
    topr = "custom_loss"
"""

import torch
from pydantic import Field

from rlcore.algorithms import PolicyLossInputs, policy_losses
from rlcore.algorithms.sequences import record_mean
from rlcore.config import Config
from rlcore.metrics import Metrics


class ToprParams(Config):
    cap: float = Field(1.0, gt=0, description="Maximum importance ratio of tokens with negative advantage.")


@policy_losses.register("topr", params=ToprParams, traits={"vanishes_with_advantage", "importance_ratio"})
def topr(inputs: PolicyLossInputs, params: ToprParams) -> tuple[torch.Tensor, Metrics]:
    """Compute −A·logπ where A ≥ 0 and −stopgrad(min(ratio, cap))·A·logπ where A < 0, per token `[T]`.

    Good samples are imitated at full strength. Bad ones lose influence as the policy moves away from them, so they
    cannot push it further without bound.
    """
    ratio = (inputs.logprobs - inputs.old_logprobs).detach().clamp(-20, 20).exp()
    negative = inputs.advantages < 0
    weight = torch.where(negative, ratio.clamp(max=params.cap), 1)
    metrics = Metrics()
    record_mean(metrics, "topr_capped", negative & (ratio > params.cap), inputs.mask)
    return -weight * inputs.advantages * inputs.logprobs, metrics


if __name__ == "__main__":
    from rlcore.cli import main

    main()
