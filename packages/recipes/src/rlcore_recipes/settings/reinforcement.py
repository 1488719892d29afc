"""The configuration that every reinforcement-learning recipe shares: its sections, and the rules that span them."""

from __future__ import annotations

from collections.abc import Iterator

from rlcore.algorithms.registries import advantages
from rlcore.config import Algorithm
from rlcore.engines.settings import adapter_rank, gives_logprobs, keeps_weights, wants_adapters
from rlcore_recipes.divisors import nearest_divisors
from rlcore_recipes.settings.algorithm import AlgorithmSettings
from rlcore_recipes.settings.columns import MADE_BY, missing_columns
from rlcore_recipes.settings.combinations import doubts
from rlcore_recipes.settings.controller import unused
from rlcore_recipes.settings.sections import RLSections

TRAINED_OR_FROZEN = ("actor", "critic", "ref", "reward_model", "prm")
"""Roles whose processes work in step with each other: a rollout among them could not generate while they work."""


class RLConfig(RLSections):
    """One run of reinforcement learning."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the reason of what cannot work."""
        yield from indivisible(self.data.train_batch_size, "actor.mini_batch_size", self.mini_batch_size)
        overlong, limit = self.algorithm.overlong, self.data.max_response_length
        if overlong is not None and overlong.buffer > limit:
            yield "algorithm.overlong.buffer", f"{overlong.buffer} does not fit into data.max_response_length={limit}"
        if self.trainer.test_freq > 0 and not self.data.val_files:
            yield "trainer.test_freq", f"is {self.trainer.test_freq}, but data.val_files is empty"
        if self.needs_scores and self.reward.name == "none" and self.reward_model is None:
            yield (
                "reward.name",
                "is none, so that nothing scores completions: set reward_model.model.path, or name a reward",
            )
        yield from self.algorithm_problems()
        if self.dynamic_sampling is not None:
            yield from dynamic_sampling_problems(self)
        yield from rollout_problems(self)
        yield from environment_problems(self)
        yield from ((f"ref.{key}", why) for key, why in self.ref.unused(self.actor) if self.needs_ref)
        yield from unused(self.controller, self.roles)
        yield from async_problems(self)

    def algorithm_problems(self) -> Iterator[tuple[str, str]]:
        """Yield why the advantage estimator or the policy loss cannot work with the samples of the run."""
        yield from ungrouped(self.algorithm.advantage, self.rollout.n)
        yield from missing_columns("algorithm.advantage", self.algorithm.advantage, self.columns)
        yield from credit_problems(self.algorithm, self.rollout.environment is not None)
        estimated = self.columns | {"advantages"} | ({"returns"} if self.has_critic else set())
        yield from missing_columns("actor.objective.policy_loss", self.actor.objective.policy_loss, estimated)

    def doubts(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the reason of what is almost surely a mistake."""
        yield from doubts(self)


def dynamic_sampling_problems(config: RLSections) -> Iterator[tuple[str, str]]:
    """Yield why dynamic sampling cannot compare the completions of a prompt."""
    if config.rollout.n == 1:
        yield "rollout.n", "is 1: dynamic sampling compares several completions of a prompt"
    if config.reward_model is not None and config.asynchronous.max_staleness > 0:
        yield "reward_model", "is too late for dynamic sampling: in asynchronous training it scores whole batches"


def rollout_problems(config: RLSections) -> Iterator[tuple[str, str]]:
    """Yield why the rollout engine, with these options, cannot serve the training of ``config``."""
    rollout, actor = config.rollout, config.actor
    section = f"rollout.{rollout.engine}"
    if wants_adapters(rollout.options) and adapter_rank(actor.options) is None:
        yield (
            f"{section}.enable_lora",
            f"the actor's engine {actor.engine} trains full weights here; have it train adapters "
            f"(actor.{actor.engine}.lora.rank=16, if the engine can), or set this to false",
        )
    if keeps_weights(rollout.options):
        yield (
            f"{section}.reload",
            "is none, so the servers would generate with the first weights in every step: say how they load new ones, "
            "or take another rollout engine",
        )
    if gives_logprobs(rollout.options):
        return
    for setting in config.rollout_logprobs_read_by:
        yield (
            f"{section}.logprobs",
            f"is false, and actor.{setting} needs the log-probs of the rollout engine: set it to true, or change actor."
            f"{setting.split('=')[0]}",
        )


def environment_problems(config: RLSections) -> Iterator[tuple[str, str]]:
    """Yield why the samples of ``config`` cannot be episodes of an environment, or why nothing scores them."""
    environment, key = config.rollout.environment, "rollout.environment"
    if environment is None:
        if config.reward.name == "environment":
            yield "reward.name", "is environment, and there is none: set rollout.environment, or name another reward"
        return
    if type(config).training_episode is not RLSections.training_episode:
        yield key, "cannot be set: this recipe has another kind of episode; leave it out, or take the recipe grpo"
    if config.response_key is not None:
        yield key, f"samples every episode, and this run takes completions of the data set ({config.response_key})"
    if "baseline_score" in config.needed_columns:
        yield (
            key,
            f"has no greedy baseline, with which {config.algorithm.advantage.name} compares: an episode with other "
            "random numbers is another task. Take an advantage estimator that compares episodes of a prompt (grpo, "
            "rloo)",
        )
    if getattr(config.algorithm, "rationalization", None) is not None:
        yield "algorithm.rationalization", f"changes the prompt, which {key} does not read; set it to null"
    tokens, limit = environment.turn_tokens, config.data.max_response_length
    if tokens is not None and tokens > limit:
        yield (
            f"{key}.turn_tokens",
            f"{tokens} does not fit into data.max_response_length={limit}, which is for all turns of an episode",
        )


def async_problems(config: RLSections) -> Iterator[tuple[str, str]]:
    """Yield why ``config`` cannot be trained asynchronously, if it is to be."""
    k, controller = config.asynchronous.max_staleness, config.controller
    if k == 0:
        if config.asynchronous.max_concurrent_groups is not None:
            yield "async.max_concurrent_groups", "is for asynchronous training; this run has async.max_staleness=0"
        return
    if controller.kind != "ray":
        yield (
            "async.max_staleness",
            f"is {k}, which needs rollout processes that work during training: set controller.kind=ray and put the "
            "rollout on a separate pool (controller.pools, controller.placement.rollout)",
        )
        return
    _, placed = controller.mapping(config.roles)
    shared = [role for role in TRAINED_OR_FROZEN if placed.get(role) == placed["rollout"]]
    if shared:
        yield (
            "async.max_staleness",
            f"is {k}, but the rollout shares the pool {placed['rollout']!r} with {', '.join(shared)} and would wait "
            "for them: put it on another one (controller.placement.rollout)",
        )
    if config.reward_model is not None and "baseline_score" in config.needed_columns:
        yield (
            "reward_model",
            f"would score samples but not the baselines that {config.algorithm.advantage.name} compares them with: in "
            "asynchronous training those get the reward's score alone",
        )


def indivisible(train_batch_size: int, key: str, mini_batch_size: int) -> Iterator[tuple[str, str]]:
    """Yield ``key`` if the batch is not a multiple of its mini-batch."""
    if train_batch_size % mini_batch_size:
        near = " or ".join(map(str, nearest_divisors(train_batch_size, mini_batch_size)))
        yield (
            key,
            f"data.train_batch_size={train_batch_size} is no multiple of {key}={mini_batch_size} (both count prompts); "
            f"the nearest size that divides it is {near}",
        )


def credit_problems(algorithm: AlgorithmSettings, episodes: bool) -> Iterator[tuple[str, str]]:
    """Yield why credit cannot be assigned as ``algorithm`` says, in a run whose rollouts are ``episodes`` or not."""
    credit, advantage = algorithm.credit, algorithm.advantage
    if not episodes:
        chosen = {"credit": credit != "trajectory", "shared_tokens": algorithm.shared_tokens != "once"}
        for key in (key for key, given in chosen.items() if given):
            yield f"algorithm.{key}", "is for episodes of several turns, and there is no rollout.environment"
    if credit != "trajectory" and "compares_turns" in advantage.entry.traits:
        yield "algorithm.credit", f"is {credit}, and {advantage.name} compares trajectories and their turns: unset it"
    elif credit == "turn" and "compares_group" not in advantage.entry.traits:
        yield (
            "algorithm.credit",
            f"is turn, and {advantage.name} does not compare the samples of a prompt: it gives every token the rewards "
            "after it. Unset it, or take an estimator that compares (grpo, rloo)",
        )
    if credit != "turn" and algorithm.turn_discount != 1:
        yield "algorithm.turn_discount", f"is for algorithm.credit=turn, which is {credit}"


def ungrouped(advantage: Algorithm, n: int) -> Iterator[tuple[str, str]]:
    """Yield why ``advantage`` cannot work with ``n`` completions of a prompt."""
    if n == 1 and "compares_group" in advantage.entry.traits:
        others = [
            " ".join(
                [entry.name, *(f"(recipe {MADE_BY[name][0]})" for name in entry.required_columns & MADE_BY.keys())]
            )
            for entry in advantages
            if "compares_group" not in entry.traits
        ]
        yield (
            "rollout.n",
            f"is 1, and {advantage.name} compares the completions of a prompt: set it to 2 or more, or take an "
            f"advantage estimator for single completions ({', '.join(others)})",
        )
