"""The registries and what the functions in them take and return.

Shapes: ``T`` tokens of a packed batch, ``B`` sequences. All functions are pure and take their parameters (the `Config`
they were registered with) as last positional argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rlcore.batch import Batch
from rlcore.config.registry import Registry
from rlcore.metrics import Metrics


@dataclass(frozen=True)
class Advantages:
    """``advantages`` ``[T]`` fp32, 0 where ``loss_mask`` is 0; ``returns`` ``[T]`` for a critic, or None."""

    advantages: torch.Tensor
    returns: torch.Tensor | None = None


class AdvantageEstimator(Protocol):
    """Reads ``loss_mask``, ``token_rewards`` (jagged fp32), ``group`` (dense int64) and its ``required_columns``.

    Any column that the recipe makes can be declared: "values" (jagged: the critic's), "baseline_score" (dense fp32: the
    score of the greedy answer), "entropy", "old_logprobs" and "ref_logprobs" (jagged, of the policy before the update
    and of the reference), "reward_result" (objects: `rlcore.engines.RewardResult`, with the parts of a combined reward
    in ``extras``), "extra" (objects: the data file's remaining fields), "completion" (objects: texts), or one that the
    recipe adds itself.

    The batch is the whole training batch: statistics over it are global. A reward may stand on any token of its
    sequence; one on a token that is not trained on is credited to the last trained token before it.
    """

    def __call__(self, batch: Batch, params: Any, /) -> Advantages: ...


@dataclass(frozen=True)
class PolicyLossInputs:
    """What a policy loss reads: all ``[T]`` fp32, except ``lengths`` ``[B]`` int64 (CPU).

    ``mask`` is 1 where a token is trained; the others are 0 where ``mask`` is 0. Only ``logprobs`` has a gradient. If
    the batch has no column ``old_logprobs``, these are the values of ``logprobs``.

    Attributes:
        columns: the ``required_columns`` of the loss, by name: per-token columns ``[T, ...]`` (0 where ``mask`` is 0 if
            of floating point), dense ones ``[B, ...]``, lists of objects. "entropy" is the current policy's, with
            gradient.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    columns: Mapping[str, Any] = field(default_factory=dict)


class PolicyLoss(Protocol):
    """Per-token loss ``[T]`` (0 where masked) and metrics; the caller aggregates.

    A loss that compares samples names with ``together`` the column of their units, which it then also gets: the samples
    of a unit are always in one call.
    """

    def __call__(self, inputs: PolicyLossInputs, params: Any, /) -> tuple[torch.Tensor, Metrics]: ...


class ValueLoss(Protocol):
    """Per-token loss ``[T]`` (0 where masked) of a critic's ``values`` against ``returns``, and metrics.

    ``old_values`` are the critic's before this batch's updates. All are ``[T]`` fp32, 0 where ``mask`` is 0.
    """

    def __call__(
        self, values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, params: Any, /
    ) -> tuple[torch.Tensor, Metrics]: ...


class KLEstimator(Protocol):
    """Per-token estimate ``[T]`` of KL(π ‖ π_ref) from ``logprobs`` and ``ref_logprobs`` ``[T]``."""

    def __call__(self, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, params: Any, /) -> torch.Tensor: ...


class Aggregation(Protocol):
    """Per-token losses ``[T]`` to the micro-batch's share of the scalar loss.

    ``denominators`` are sums over the whole mini-batch: "tokens" (mask sum) and "sequences" (sequences with at least
    one trained token), so the shares add up to the same loss however the mini-batch is divided.
    """

    def __call__(
        self,
        losses: torch.Tensor,
        mask: torch.Tensor,
        lengths: torch.Tensor,
        denominators: Mapping[str, float],
        params: Any,
        /,
    ) -> torch.Tensor: ...


class Correction(Protocol):
    """Per-token weights ``[T]`` (no gradient) on the policy loss, for samples that another policy than π_old drew,
    and metrics. ``rollout_logprobs`` are the sampler's, ``old_logprobs`` the trainer's (those of the current policy
    where the run takes the sampler's for its old ones); both 0 where masked."""

    def __call__(
        self,
        rollout_logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        mask: torch.Tensor,
        lengths: torch.Tensor,
        params: Any,
        /,
    ) -> tuple[torch.Tensor, Metrics]: ...


class Divergence(Protocol):
    """The summands ``[..., K]`` of a divergence between two distributions over K buckets, given as log-probs
    ``[..., K]`` fp32. Their sum over the buckets is at least 0, and 0 where the distributions are equal. Only
    ``student`` has a gradient."""

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, params: Any, /) -> torch.Tensor: ...


class SamplingFilter(Protocol):
    """Which samples to keep, ``[B]`` bool, from ``scores`` ``[B]`` and ``group`` ``[B]``; whole groups at a time."""

    def __call__(self, scores: torch.Tensor, group: torch.Tensor, params: Any, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Answers:
    """Log-probs of answers, each summed over its trained tokens: all ``[N]`` fp64.

    Attributes:
        logprobs: under the policy, with gradient.
        ref_logprobs: under the reference; 0 for losses that do not declare "ref_answer_logprob".
        tokens: trained tokens, at least 1.
    """

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    tokens: torch.Tensor

    @property
    def log_ratio(self) -> torch.Tensor:
        """Return log(π / π_ref) of each answer."""
        return self.logprobs - self.ref_logprobs

    @property
    def mean_log_ratio(self) -> torch.Tensor:
        """Return log(π / π_ref) per token."""
        return self.log_ratio / self.tokens

    @property
    def mean_logprobs(self) -> torch.Tensor:
        """Return log π per token."""
        return self.logprobs / self.tokens


@dataclass(frozen=True)
class PreferenceInputs:
    """What a preference loss reads.

    Attributes:
        chosen: preferred answers. Of a loss with ``together="pair"``, entry *i* of both sides is one pair; of a loss
            without, the sides are answers that have nothing to do with each other, and any number of them.
        rejected: the other answers.
        kl: estimate of KL(π ‖ π_ref) over the mini-batch, at least 0, for losses that declare "kl_log_ratio"; else 0.
        margins: ``[P]`` fp64, by how much each chosen answer is better, for losses of pairs that declare "margin".
    """

    chosen: Answers
    rejected: Answers
    kl: float = 0.0
    margins: torch.Tensor | None = None


@dataclass(frozen=True)
class Preferences:
    """The result of a preference loss, all fp64.

    Attributes:
        losses: one per pair, or one per answer where there are no pairs.
        chosen_rewards: what the loss takes for the reward of each chosen answer, which it wants to be higher than that
            of the rejected one.
        rejected_rewards: the same of each rejected answer.
    """

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


class PreferenceLoss(Protocol):
    """Losses and rewards of answers; the caller averages over the mini-batch.

    A loss of pairs declares ``together="pair"``. A loss that compares with a reference declares the column
    "ref_answer_logprob", one that needs the policy's distance from it "kl_log_ratio", and one that reads how much
    better the chosen answers are "margin".
    """

    def __call__(self, inputs: PreferenceInputs, params: Any, /) -> Preferences: ...


@dataclass(frozen=True)
class RewardLossInputs:
    """What a loss of reward models reads, at the N tokens whose scores are trained.

    Attributes:
        scores: ``[N]`` fp32 with gradient.
        columns: the ``required_columns`` of the loss at these tokens, ``[N, ...]``: per-token columns, and dense ones
            as their sequences have them.
    """

    scores: torch.Tensor
    columns: Mapping[str, torch.Tensor]


class RewardLoss(Protocol):
    """Loss of each unit ``[U]`` fp64 and metrics; the caller averages over the mini-batch.

    A unit is a pair, if the loss declares ``together="pair"``, or one token. Columns that a recipe makes: "pair",
    "side" (dense int64: 0 chosen, 1 rejected), "margin" (dense fp32), or "labels" (jagged fp32, of scored tokens).
    """

    def __call__(self, inputs: RewardLossInputs, params: Any, /) -> tuple[torch.Tensor, Metrics]: ...


class PairBuilder(Protocol):
    """Which samples to compare: the rows of the preferred ones and of the others, ``[P]`` int64 each, from ``scores``
    ``[B]`` fp32 and ``group`` ``[B]`` int64 of samples of one or several prompts.

    Both samples of a pair belong to the same group. A row may be in several pairs, or in none.
    """

    def __call__(
        self, scores: torch.Tensor, group: torch.Tensor, params: Any, /
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class SampleSelector(Protocol):
    """The weight of each sample in training, ``[B]`` fp32, from ``scores`` ``[B]`` fp32 and ``group`` ``[B]`` int64.

    0 leaves a sample out. Groups may have different sizes: samples that cannot be trained on are not among them.
    """

    def __call__(self, scores: torch.Tensor, group: torch.Tensor, params: Any, /) -> torch.Tensor: ...


advantages: Registry[AdvantageEstimator] = Registry("advantage estimator", columns=True)
policy_losses: Registry[PolicyLoss] = Registry("policy loss", columns=True, units=True)
value_losses: Registry[ValueLoss] = Registry("value loss")
kl_estimators: Registry[KLEstimator] = Registry("KL estimator")
aggregations: Registry[Aggregation] = Registry("loss aggregation")
corrections: Registry[Correction] = Registry("off-policy correction")
divergences: Registry[Divergence] = Registry("divergence")
sampling_filters: Registry[SamplingFilter] = Registry("sampling filter")
preference_losses: Registry[PreferenceLoss] = Registry("preference loss", columns=True, units=True)
reward_losses: Registry[RewardLoss] = Registry("reward-model loss", columns=True, units=True)
sample_selectors: Registry[SampleSelector] = Registry("sample selector")
pair_builders: Registry[PairBuilder] = Registry("pair builder")
