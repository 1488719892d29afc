"""``critic.*``: the value model of PPO."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlcore_recipes.from_verl.keys.actor import compute_keys, micro_batch_keys
from rlcore_recipes.from_verl.keys.engines import fsdp_keys, megatron_keys
from rlcore_recipes.from_verl.keys.entries import (
    Convert,
    Key,
    NoEquivalent,
    NothingToSet,
    Several,
    already,
    already_if,
    key,
)
from rlcore_recipes.from_verl.keys.model import model_keys
from rlcore_recipes.from_verl.keys.optim import optim_keys
from rlcore_recipes.from_verl.values import as_list
from rlcore_recipes.from_verl.view import VerlView

LOSS = "critic.objective.value_loss"
AGGREGATION = ("critic.objective.aggregation.name", "critic.objective.aggregation.max_length")


def value_clip(value: Any, verl: VerlView) -> Several:
    """Return the critic's loss with its clip range."""
    return Several({f"{LOSS}.name": "clipped", f"{LOSS}.clip_range": value})


def aggregation(value: Any, verl: VerlView) -> Several:
    """Return how the critic's token losses become one number."""
    mode = str(verl.get("critic.loss_agg_mode"))
    found = Several({AGGREGATION[0]: mode})
    if mode == "seq-mean-token-sum-norm":
        factor = verl.get("critic.loss_scale_factor")
        found[AGGREGATION[1]] = verl.whole("data.max_response_length") if factor is None else factor
    return found


def with_critic(entry: Key) -> Key:
    """Return ``entry`` for runs with a critic; verl ignores the section otherwise."""

    def convert(value: Any, verl: VerlView) -> Any:
        if not verl.has_critic:
            raise NothingToSet(f"adv_estimator={verl.get('algorithm.adv_estimator')} has no critic")
        if any(name.startswith("critic.model.") for name in entry.ours) and verl.get("critic.model.path") is None:
            raise NoEquivalent("name the critic's model too: critic.model.path")
        return entry.convert(value, verl)

    guarded: Convert = convert
    return replace(entry, convert=guarded)


def saved_critic(value: Any, verl: VerlView) -> Any:
    """Check what is saved of the critic."""
    if "hf_model" in as_list(value):
        raise NoEquivalent("a critic is part of checkpoints only, not written as a Hugging Face folder")
    raise NothingToSet("one checkpoint holds all models")


def critic_strategy(value: Any, verl: VerlView) -> str:
    """Return the critic's engine."""
    return "megatron" if value == "megatron" else "fsdp"


_KEYS: tuple[Key, ...] = (
    key("critic.strategy", "critic.engine", critic_strategy),
    key("critic.enable", "critic.enable"),
    key("critic.ppo_mini_batch_size", "critic.mini_batch_size", meaning="prompts in both"),
    key("critic.ppo_epochs", "critic.epochs"),
    *micro_batch_keys(
        "critic",
        "ppo_",
        "critic",
        dynamic="use_dynamic_bsz",
        tokens="ppo_max_token_len_per_gpu",
        default_tokens=32768,
        switch_default="${actor_rollout_ref.actor.use_dynamic_bsz}",
    ),
    key("critic.cliprange_value", (f"{LOSS}.name", f"{LOSS}.clip_range"), value_clip, default=0.5),
    key("critic.loss_agg_mode", AGGREGATION, aggregation, default="${actor_rollout_ref.actor.loss_agg_mode}"),
    *optim_keys("critic.optim", "critic", 1e-5, clip=("critic.grad_clip",)),
    *model_keys("critic.model", "critic.model", "critic"),
    *fsdp_keys("critic.fsdp", "critic"),
    *(replace(entry, old=()) for entry in fsdp_keys("critic.model.fsdp_config", "critic")),
    *megatron_keys("critic.megatron", "critic"),
    *compute_keys("critic"),
    already("critic.loss_scale_factor", "the critic divides by data.max_response_length"),
    already("critic.forward_micro_batch_size", "values are computed with the budget of the critic's update"),
    already("critic.forward_micro_batch_size_per_gpu", "values are computed with the budget of the critic's update"),
    already("critic.forward_max_token_len_per_gpu", "values are computed with the budget of the critic's update"),
    already_if("critic.shuffle", (False,), "mini-batches keep the order", "mini-batches keep the order of the batch"),
    already("critic.data_loader_seed", "mini-batches keep the order of the batch"),
    already("critic.rollout_n", "it is rollout.n"),
    key("critic.checkpoint.save_contents", (), saved_critic, meaning="nothing to set: one checkpoint holds all models"),
    already("critic.checkpoint.*", "one checkpoint holds all models"),
)

KEYS: tuple[Key, ...] = tuple(map(with_critic, _KEYS))
