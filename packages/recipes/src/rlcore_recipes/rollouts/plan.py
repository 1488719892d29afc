"""Plans of rolling samples out in training and in validation, from the configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from rlcore.config import Algorithm
from rlcore.engines import ModelSettings, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeSpec, PromptSample
from rlcore.engines.settings import gives_logprobs
from rlcore_recipes.rollouts.environment import EnvironmentEpisode
from rlcore_recipes.rollouts.episode import Episode, single_completion
from rlcore_recipes.rollouts.given import given_first, given_or_sampled
from rlcore_recipes.rollouts.group_job import GroupJob
from rlcore_recipes.rollouts.sampling import greedy, training_sampling, validation_sampling
from rlcore_recipes.rollouts.trajectories import TreeRows
from rlcore_recipes.settings import RLConfig
from rlcore_recipes.settings.environment import EnvironmentRole
from rlcore_recipes.settings.evaluation import EvalConfig


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


def training_plan(
    config: RLConfig, stop_tokens: tuple[int, ...] = (), end_tokens: frozenset[int] = frozenset()
) -> RolloutPlan:
    """Return the plan of training.

    Args:
        stop_tokens: as in `training_sampling`.
        end_tokens: all tokens that end a completion.
    """
    sampling = training_sampling(config.rollout, config.data.max_response_length, stop_tokens)
    compares = "baseline_score" in config.needed_columns
    episode: Episode = partial(single_completion, sampling=sampling)
    own = config.training_episode(sampling)
    if own is not None:
        episode = own
    elif config.rollout.environment is not None:
        episode = environment_episode(config, config.model, sampling, end_tokens, "train")
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
        trees=tree_rows(
            config.rollout.environment,
            getattr(config.algorithm, "shared_tokens", "once"),
            "turn_state" in config.needed_columns,
            sampling.logprobs and gives_logprobs(config.rollout.options),
        ),
    )


def validation_plan(
    config: RLConfig, stop_tokens: tuple[int, ...] = (), end_tokens: frozenset[int] = frozenset()
) -> RolloutPlan:
    """Return the plan of validation: completions or episodes, sampled as ``rollout.validation`` says.

    For the arguments see `training_plan`.
    """
    sampling = validation_sampling(config.rollout, config.data.max_response_length, stop_tokens)
    episode: Episode = partial(single_completion, sampling=sampling)
    if config.rollout.environment is not None:
        episode = environment_episode(config, config.model, sampling, end_tokens, "validation")
    trees = tree_rows(config.rollout.environment)
    return RolloutPlan(episode, config.rollout.validation.n, config.seed, "validation", trees=trees)


def tree_rows(
    environment: EnvironmentRole | None,
    shared_tokens: Literal["once", "every_row"] = "once",
    turn_state: bool = False,
    logprobs: bool = False,
) -> TreeRows | None:
    """Return how the trajectories of ``environment`` become rows (see `TreeRows`); None without one."""
    return None if environment is None else TreeRows(shared_tokens, environment.error_score, turn_state, logprobs)


def environment_episode(
    config: RLConfig | EvalConfig,
    model: ModelSettings,
    sampling: SamplingParams,
    end_tokens: frozenset[int],
    purpose: str,
) -> EnvironmentEpisode:
    """Return the episode of ``rollout.environment``; ``sampling`` is that of a single completion."""
    role, data = config.rollout.environment, config.data
    assert role is not None
    turn_tokens = min(role.turn_tokens or sampling.max_tokens, sampling.max_tokens)
    spec = EpisodeSpec(
        model=model,
        options=role.options,
        sampling=replace(sampling, max_tokens=turn_tokens),
        limits=EpisodeLimits(role.max_turns, data.max_response_length, data.longest_sequence, role.timeout_s),
        chat_template_kwargs=data.chat_template_kwargs,
        end_tokens=end_tokens,
        purpose=purpose,
    )
    return EnvironmentEpisode(role.name, spec, role.retries)
