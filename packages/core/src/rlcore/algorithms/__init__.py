"""Algorithms as pure functions in registries.

A registry holds the functions of one kind by name (`rlcore.algorithms.registries` states what they take and return);
`objectives` composes them into the losses that training engines call. Importing this package registers the built-in
ones; further ones come from ``rlcore.algorithms`` entry points.
"""

from rlcore.algorithms import (
    aggregation,
    discounted,
    divergences,
    filters,
    group_relative,
    implicit_reward,
    kl,
    off_policy,
    pair_building,
    pair_losses,
    reference_free_losses,
    score_losses,
    selection,
    sequence_losses,
    token_losses,
    unpaired_losses,
    value_loss,
)
from rlcore.algorithms.registries import (
    Advantages,
    PolicyLossInputs,
    advantages,
    aggregations,
    corrections,
    kl_estimators,
    pair_builders,
    policy_losses,
    preference_losses,
    reward_losses,
    sample_selectors,
    sampling_filters,
    value_losses,
)

__all__ = [
    "Advantages",
    "PolicyLossInputs",
    "advantages",
    "aggregation",
    "aggregations",
    "corrections",
    "discounted",
    "divergences",
    "filters",
    "group_relative",
    "implicit_reward",
    "kl",
    "kl_estimators",
    "off_policy",
    "pair_builders",
    "pair_building",
    "pair_losses",
    "policy_losses",
    "preference_losses",
    "reference_free_losses",
    "reward_losses",
    "sample_selectors",
    "sampling_filters",
    "score_losses",
    "selection",
    "sequence_losses",
    "token_losses",
    "unpaired_losses",
    "value_loss",
    "value_losses",
]
