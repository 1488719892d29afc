"""Plans of rolling samples out in training and in validation, from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from rlcore.config import Algorithm
from rlcore.engines.episode import PromptSample
from rlcore_recipes.rollouts.episode import Episode, single_completion
from rlcore_recipes.rollouts.given import given_first, given_or_sampled
from rlcore_recipes.rollouts.group_job import GroupJob
from rlcore_recipes.rollouts.sampling import greedy, training_sampling, validation_sampling
from rlcore_recipes.rollouts.trajectories import TreeRows
from rlcore_recipes.settings import RLConfig


@dataclass(frozen=True)
class RolloutPlan:
    """How samples are rolled out.

    Attributes:
        episode: makes one trajectory.
        n: episodes per sample.
        seed: of the run.
        purpose: "train" or "validation"; seeds differ by it.
        baseline: makes the trajectory with whose score the others are compared (ReMax); None without one.
        keep: sampling filter: which groups to train on; None keeps all.
        trees: how trajectories become rows; None: all have one row.
    """

    episode: Episode
    n: int
    seed: int
    purpose: str = "train"
    baseline: Episode | None = None
    keep: Algorithm | None = None
    trees: TreeRows | None = None

    def job(self, sample: PromptSample) -> GroupJob:
        """Return the episodes to run for ``sample``."""
        return GroupJob(sample, self.episode, self.n, self.seed, self.purpose, self.trees)

    def baseline_job(self, sample: PromptSample) -> GroupJob | None:
        """Return the episode to run for the baseline of ``sample``; None without a baseline."""
        return None if self.baseline is None else GroupJob(sample, self.baseline, 1, self.seed, "baseline")


def training_plan(config: RLConfig, stop_tokens: tuple[int, ...] = ()) -> RolloutPlan:
    """Return the plan of training; ``stop_tokens`` as in `training_sampling`."""
    sampling = training_sampling(config.rollout, config.data.max_response_length, stop_tokens)
    compares = "baseline_score" in config.needed_columns
    episode: Episode = partial(single_completion, sampling=sampling)
    own = config.training_episode(sampling)
    if own is not None:
        episode = own
    elif config.given_first:
        episode = partial(given_first, sampling=sampling, run_seed=config.seed)
    elif config.response_key is not None:
        episode = partial(given_or_sampled, sampling=sampling, fraction=config.sampled_fraction, run_seed=config.seed)
    return RolloutPlan(
        episode=episode,
        n=config.rollout.n,
        seed=config.seed,
        baseline=partial(single_completion, sampling=greedy(sampling)) if compares else None,
        keep=None if config.dynamic_sampling is None else config.dynamic_sampling.filter,
    )


def validation_plan(config: RLConfig, stop_tokens: tuple[int, ...] = ()) -> RolloutPlan:
    """Return the plan of validation: single completions, sampled as ``rollout.validation`` says."""
    sampling = validation_sampling(config.rollout, config.data.max_response_length, stop_tokens)
    episode = partial(single_completion, sampling=sampling)
    return RolloutPlan(episode, config.rollout.validation.n, config.seed, "validation")
