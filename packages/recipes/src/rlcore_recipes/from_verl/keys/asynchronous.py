"""``async_training.*`` and ``rollout.*``: verl's trainers whose rollout is on other GPUs than the policy."""

from __future__ import annotations

import math
from typing import Any

from rlcore_recipes.from_verl.keys.actor import mini_batch
from rlcore_recipes.from_verl.keys.entries import Convert, Key, NoEquivalent, NothingToSet, already, key, without
from rlcore_recipes.from_verl.keys.rollout import top_k
from rlcore_recipes.from_verl.keys.trainer import POOLS, every, placement
from rlcore_recipes.from_verl.values import flag, number, whole
from rlcore_recipes.from_verl.view import VerlView

ASYNC = "async_training"


def only_apart(convert: Convert) -> Convert:
    """Return ``convert`` for a key of verl's fully asynchronous trainer, with its default in no other."""

    def checked(value: Any, verl: VerlView) -> Any:
        if not verl.any_below(ASYNC):
            raise NothingToSet("the trainer is synchronous")
        return convert(value, verl)

    return checked


def staleness(value: Any, verl: VerlView) -> int:
    """Return the policy versions that a sample may be old: at least one, because generation never waits."""
    return max(1, math.ceil(number(value, f"{ASYNC}.staleness_threshold")))


def batch(value: Any, verl: VerlView) -> int:
    """Return the prompts between two updates of the rollout's weights."""
    return verl.batch


def total(value: Any, verl: VerlView) -> int:
    """Return the steps that ``value`` prompts make."""
    return max(whole(value, "rollout.total_rollout_steps") // verl.batch, 1)


def old_logprobs(value: Any, verl: VerlView) -> str:
    """Return where the ratio's old log-probs come from."""
    return "rollout" if flag(value) and not verl.flag(f"{ASYNC}.compute_prox_log_prob") else "recompute"


def partial(value: Any, verl: VerlView) -> Any:
    """Check what happens to unfinished completions when weights change."""
    if flag(value):
        raise NothingToSet("unfinished completions always go on under the new weights")
    raise NoEquivalent("unfinished completions always go on under the new weights; a correction weighs their tokens")


def apart(value: Any, verl: VerlView) -> Any:
    """Return the pools, in verl's asynchronous trainers."""
    if not verl.asynchronous:
        raise NothingToSet("the rollout shares the policy's GPUs")
    return placement(value, verl)


_BATCH = "together with ppo_mini_batch_size, the prompts between two updates of the rollout's weights"

KEYS: tuple[Key, ...] = (
    key("rollout.nnodes", POOLS, apart, old=("actor_rollout_ref.rollout.nnodes",), meaning="a pool for generation"),
    key(
        "rollout.n_gpus_per_node",
        POOLS,
        apart,
        old=("actor_rollout_ref.rollout.n_gpus_per_node",),
        meaning="a pool for generation",
    ),
    key("rollout.total_rollout_steps", "trainer.total_steps", total, meaning="prompts; divided by those of a step"),
    key("rollout.total_epochs", "trainer.total_epochs"),
    key("rollout.test_freq", "trainer.test_freq", every, meaning="updates of the rollout's weights, which are steps"),
    key(
        f"{ASYNC}.staleness_threshold",
        "async.max_staleness",
        only_apart(staleness),
        differs=0.1,
        meaning="rounded up, at least 1: a strict bound in policy versions",
    ),
    key(f"{ASYNC}.trigger_parameter_sync_step", "data.train_batch_size", only_apart(batch), differs=4, meaning=_BATCH),
    key(f"{ASYNC}.require_batches", "actor.mini_batch_size", mini_batch, default=1, meaning=_BATCH),
    key(f"{ASYNC}.use_rollout_log_probs", "actor.old_logprobs", old_logprobs),
    key(f"{ASYNC}.compute_prox_log_prob", "actor.old_logprobs", old_logprobs, default=False, meaning="True: recompute"),
    key(f"{ASYNC}.partial_rollout", (), partial, meaning="nothing to set: completions go on under new weights"),
    already(f"{ASYNC}.checkpoint_engine.*", "weights travel by weight_sync.transport"),
    without(f"{ASYNC}.*", "there is no such setting"),
    key("rollout.temperature", "rollout.temperature"),
    key("rollout.top_k", "rollout.top_k", top_k),
    key("rollout.top_p", "rollout.top_p"),
    already("rollout.prompt_length", "it is data.max_prompt_length"),
    already("rollout.response_length", "it is data.max_response_length"),
    without("rollout.*", "a setting of verl's generation command: use `rlcore generate`"),
)
