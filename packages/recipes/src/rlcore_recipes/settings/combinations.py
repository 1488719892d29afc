"""Combinations of settings that are legal and almost surely a mistake, each with its reason.

To add one, write a generator as below and list it in `COMBINATIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from rlcore.algorithms.aggregation import ConstantLengthParams
from rlcore.algorithms.off_policy import USUAL_HIGH, USUAL_LOW, MISParams
from rlcore.algorithms.sequence_losses import GSPOParams
from rlcore_recipes.settings.sections import RLSections

Doubt = tuple[str, str]
"""A dotted key, and why its value does not fit the others."""

WEIGHTED_BY_LENGTH = ("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
WITHOUT_RATIO = ("reinforce", "gpg")
WIDEST_SEQUENCE_CLIP = 0.1  # mean log-ratios of sequences are hundreds of times smaller than those of tokens


def doubts(config: RLSections) -> Iterator[Doubt]:
    """Yield all doubtful combinations in ``config``."""
    for combination in COMBINATIONS:
        yield from combination(config)


def sequence_ratio_by_tokens(config: RLSections) -> Iterator[Doubt]:
    """Yield a loss with one ratio per sequence whose aggregation weighs by length."""
    objective = config.actor.objective
    loss, aggregation = objective.policy_loss, objective.aggregation
    if "sequence_ratio" in loss.entry.traits and aggregation.name in WEIGHTED_BY_LENGTH:
        yield (
            "actor.objective.aggregation",
            f"{aggregation.name} gives long completions more weight, and {loss.name}, whose ratio is one per "
            "completion, is derived for seq-mean-token-mean",
        )


def sequence_clip_for_tokens(config: RLSections) -> Iterator[Doubt]:
    """Yield clip bounds of tokens for a ratio of sequences."""
    params = config.actor.objective.policy_loss.params
    if not isinstance(params, GSPOParams):
        return
    if any(WIDEST_SEQUENCE_CLIP <= bound < math.inf for bound in (params.clip_low, params.clip_high)):
        yield (
            "actor.objective.policy_loss",
            "gspo clips the mean log-ratio of a completion, which hardly reaches such bounds: they are for tokens. "
            "The paper has clip_low=3e-4 and clip_high=4e-4",
        )


def mean_of_token_advantages(config: RLSections) -> Iterator[Doubt]:
    """Yield GMPO, which averages the advantages of a completion, with advantages per token."""
    loss, advantage = config.actor.objective.policy_loss, config.algorithm.advantage
    per_token = "values" in advantage.entry.required_columns or config.algorithm.kl_in_reward is not None
    if loss.name == "gmpo" and per_token and "compares_group" not in advantage.entry.traits:
        yield (
            "actor.objective.policy_loss",
            f"gmpo takes the mean advantage of a completion, so that those which {advantage.name} gives to single "
            "tokens are lost",
        )


def gpg_with_a_ratio(config: RLSections) -> Iterator[Doubt]:
    """Yield the advantages of GPG with a policy loss that has an importance ratio."""
    loss, advantage = config.actor.objective.policy_loss, config.algorithm.advantage
    if advantage.name == "gpg" and "importance_ratio" in loss.entry.traits:
        yield (
            "algorithm.advantage",
            f"gpg scales advantages for a plain policy gradient, and the policy loss is {loss.name}: take the policy "
            "loss gpg, or the advantage estimator grpo",
        )


def off_policy_without_a_ratio(config: RLSections) -> Iterator[Doubt]:
    """Yield a loss without an importance ratio on samples of an older policy."""
    actor, updates = config.actor, config.updates_per_step
    from_rollout = actor.old_logprobs == "rollout"
    weighed = actor.objective.correction is not None
    # a correction with recomputed log-probs weighs by the policy before the step's first update
    stale = updates > 1 and not (weighed and from_rollout)
    late = config.asynchronous.max_staleness > 0 and from_rollout and not weighed
    if actor.objective.policy_loss.name in WITHOUT_RATIO and (stale or late) and not config.imitates:
        of = f"{updates} updates on each batch" if stale else f"async.max_staleness={config.asynchronous.max_staleness}"
        yield (
            "actor.objective.policy_loss",
            f"{actor.objective.policy_loss.name} assumes samples of the policy that is trained, and with {of} "
            "they are not: take a loss with a ratio (ppo), one update on each batch, or old_logprobs=rollout with a "
            "correction",
        )


def asynchronous_without_correction(config: RLSections) -> Iterator[Doubt]:
    """Yield asynchronous training without a correction for stale samples."""
    actor, k = config.actor, config.asynchronous.max_staleness
    if k > 0 and actor.old_logprobs == "recompute" and actor.objective.correction is None and not config.imitates:
        ratio = "importance_ratio" in actor.objective.policy_loss.entry.traits
        yield (
            "async.max_staleness",
            f"is {k}, and nothing corrects for the older policies that made the samples: set "
            f"actor.objective.correction (tis, mis or icepop){', or actor.old_logprobs=rollout' * ratio}",
        )


def kl_loss_without_gradient(config: RLSections) -> Iterator[Doubt]:
    """Yield a KL loss whose estimator has no useful gradient."""
    kl = config.actor.objective.kl_loss
    if kl.coeff > 0 and kl.estimator.name == "k1":
        yield (
            "actor.objective.kl_loss.estimator",
            "the gradient of k1 as a loss is 0 on average: it adds noise and does not hold the policy to the "
            "reference. Take k3+, k2 or k3 (k1 is for algorithm.kl_in_reward)",
        )


def constant_length(config: RLSections) -> Iterator[Doubt]:
    """Yield a constant normaliser that is not the maximum length of completions."""
    params, longest = config.actor.objective.aggregation.params, config.data.max_response_length
    if isinstance(params, ConstantLengthParams) and params.max_length != longest:
        yield (
            "actor.objective.aggregation.max_length",
            f"is {params.max_length}, and data.max_response_length {longest}: Dr. GRPO divides by the response budget; "
            "another constant scales the loss, and so the learning rate",
        )


def ratios_of_truncated_samples(config: RLSections) -> Iterator[Doubt]:
    """Yield importance ratios of samples drawn from a truncated distribution."""
    rollout, actor = config.rollout, config.actor
    usual = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    cut = [f"{key}={getattr(rollout, key)}" for key, off in usual.items() if getattr(rollout, key) != off]
    off_policy = config.updates_per_step > 1 or actor.old_logprobs == "rollout"
    in_loss = off_policy and "importance_ratio" in actor.objective.policy_loss.entry.traits
    if cut and (in_loss or actor.objective.correction is not None):
        yield (
            f"rollout.{cut[0].split('=')[0]}",
            f"with {', '.join(cut)} completions come from a part of the vocabulary, and log-probs are those of the "
            "whole: importance ratios are not those of the distribution that was sampled",
        )


def geometric_mean_with_token_bounds(config: RLSections) -> Iterator[Doubt]:
    """Yield bounds of tokens for a geometric mean over sequences."""
    correction = config.actor.objective.correction
    params = None if correction is None else correction.params
    if not isinstance(params, MISParams) or params.level != "geometric":
        return
    if params.low <= USUAL_LOW and params.high >= USUAL_HIGH:
        yield (
            "actor.objective.correction",
            f"a geometric mean of ratios is hardly ever outside [{params.low}, {params.high}]: nothing "
            "is dropped. Its bounds belong close to 1, such as low=0.99 and high=1.01",
        )


def unused_reference(config: RLSections) -> Iterator[Doubt]:
    """Yield a reference model that nothing uses."""
    if config.ref.model is not None and not config.needs_ref:
        yield (
            "ref.model",
            "is not loaded: there is neither a KL loss (actor.objective.kl_loss.coeff) nor a KL penalty "
            "(algorithm.kl_in_reward)",
        )


COMBINATIONS: tuple[Callable[[RLSections], Iterator[Doubt]], ...] = (
    sequence_ratio_by_tokens,
    sequence_clip_for_tokens,
    mean_of_token_advantages,
    gpg_with_a_ratio,
    off_policy_without_a_ratio,
    asynchronous_without_correction,
    kl_loss_without_gradient,
    constant_length,
    ratios_of_truncated_samples,
    geometric_mean_with_token_bounds,
    unused_reference,
)
