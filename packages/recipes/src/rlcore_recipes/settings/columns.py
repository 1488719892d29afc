"""The columns that the batches of a run have: an algorithm that needs another one is refused before training."""

from __future__ import annotations

from collections.abc import Iterator, Set

from rlcore.config import Algorithm

SAMPLED = frozenset(
    {
        "tokens", "loss_mask", "rollout_logprobs", "token_version",
        "group", "prompt_length", "response_length", "policy_version", "later_version_tokens",
        "finish_reason", "messages", "prompt_text", "ground_truth", "data_source", "extra",
    }
)  # fmt: skip
"""Of trajectories (`rlcore_recipes.rollouts.trajectories.group_batch`)."""

EPISODES = frozenset(
    {
        "trajectory", "shared_prefix", "episode_score", "valid", "step_rewards", "turn_state", "transcript", "invalid",
        "episode_metrics",
    }
)  # fmt: skip
"""Of trajectories of an environment, in addition (`rlcore_recipes.rollouts.trajectories.tree_columns`)."""

SCORED = frozenset({"score", "reward_result", "completion"})
"""Of the reward."""

ON_DEMAND = frozenset({"old_logprobs", "ref_logprobs", "entropy", "baseline_score"})
"""Computed where an algorithm or another setting needs them."""

SHAPED = frozenset({"token_rewards"})
"""Added by reward shaping, before the advantages."""

MADE_BY = {
    "values": ("ppo", "the values of a critic, which the recipe ppo trains"),
    "process_rewards": ("prime", "the rewards of tokens, which the recipe prime computes"),
    "turn_state": ("grpo", "the states of turns, which episodes of an environment (rollout.environment) have"),
    "sample_weight": ("raft", "the weights of samples, which the recipe raft selects"),
}
"""Columns that not every run makes: a recipe that can, and the column in words."""


def missing_columns(key: str, choice: Algorithm, available: Set[str]) -> Iterator[tuple[str, str]]:
    """Yield why ``choice`` cannot be used where a batch has the columns ``available``."""
    for name in sorted(choice.entry.required_columns - available):
        if name in MADE_BY:
            yield key, f"{choice.name} needs {MADE_BY[name][1]}"
        else:
            yield (
                key,
                f"{choice.name} needs the column {name!r}, which this recipe does not make; it makes "
                f"{', '.join(sorted(available))}",
            )
