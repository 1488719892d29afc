"""``actor_rollout_ref.actor.*`` and ``actor_rollout_ref.ref.*``: the policy's update, and the reference policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlcore_recipes.from_verl.keys import losses
from rlcore_recipes.from_verl.keys.engines import (
    IN_CHUNKS,
    PACKED,
    ULYSSES,
    fsdp_keys,
    megatron_keys,
    quantisation_aware,
    router_replay,
)
from rlcore_recipes.from_verl.keys.entries import (
    Convert,
    Key,
    NoEquivalent,
    NothingToSet,
    already,
    already_if,
    key,
    without,
)
from rlcore_recipes.from_verl.keys.optim import optim_keys
from rlcore_recipes.from_verl.keys.trainer import saved
from rlcore_recipes.from_verl.values import whole
from rlcore_recipes.from_verl.view import VerlView

ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
TRACE = "rlcore's profile is a trace of all processes: trace=true"
BUDGET = "a token budget; losses and gradients do not depend on it"


def strategy(value: Any, verl: VerlView) -> str:
    """Return the training engine."""
    if value not in ("fsdp", "fsdp2", "megatron"):
        raise NoEquivalent("the training engines are fsdp and megatron; this run uses fsdp")
    return verl.engine


def tokens_of(sequences: str, dynamic: str, tokens: str, shared: str | None = None) -> Any:
    """Return the conversion of a role's micro-batches to a token budget.

    Args:
        sequences: key of the sequences per GPU.
        dynamic: key of the switch that has tokens counted instead.
        tokens: key of the tokens per GPU.
        shared: former key of the sequences over all GPUs.
    """

    def budget(value: Any, verl: VerlView) -> int:
        if verl.flag(dynamic):
            return verl.whole(tokens)
        per_gpu = verl.get(sequences)
        if per_gpu is None and shared is not None and verl.get(shared) is not None:
            per_gpu = verl.whole(shared) // verl.processes
        if per_gpu is None:
            raise NothingToSet("the token budget is what fits into memory")
        return max(whole(per_gpu, sequences), 1) * verl.longest_sequence

    return budget


def when(switch: str, on: bool, budget: Any) -> Any:
    """Return ``budget`` for a key that verl reads only if ``switch`` is ``on``."""

    def convert(value: Any, verl: VerlView) -> Any:
        if verl.flag(switch) != on:
            raise NothingToSet(f"verl does not read it with {switch.rpartition('.')[2]}={verl.flag(switch)}")
        return budget(value, verl)

    return convert


def micro_batch_keys(
    section: str, prefix: str, ours: str, *, dynamic: str, default_tokens: Any, switch_default: Any, tokens: str
) -> tuple[Key, ...]:
    """Return the keys of one role's micro-batches.

    Args:
        prefix: of the names, such as ``ppo_`` or ``log_prob_``.
        dynamic: name of the switch.
        tokens: name of the tokens per GPU.
    """
    sequences, shared = f"{section}.{prefix}micro_batch_size_per_gpu", f"{section}.{prefix}micro_batch_size"
    switch, of_tokens = f"{section}.{dynamic}", f"{section}.{tokens}"
    budget = tokens_of(sequences, switch, of_tokens, shared)
    target = f"{ours}.max_tokens_per_micro_batch"
    counted = f"times the longest sequence: {BUDGET}"
    return (
        key(sequences, target, when(switch, False, budget), meaning=counted),
        key(shared, target, when(switch, False, budget), meaning=f"divided by the GPUs, {counted}"),
        key(switch, target, budget, default=switch_default, meaning="whether sequences or tokens are counted"),
        key(of_tokens, target, when(switch, True, budget), default=default_tokens, meaning=BUDGET),
    )


def mini_batch(value: Any, verl: VerlView) -> int:
    """Return the prompts of an optimizer step."""
    return verl.mini_batch


def ref_strategy(value: Any, verl: VerlView) -> str:
    """Return the reference's engine."""
    names = {"fsdp": "fsdp", "fsdp2": "fsdp", "megatron": "megatron"}
    if value not in names:
        raise NoEquivalent("the training engines are fsdp and megatron")
    return names[value]


def for_reference(keys: tuple[Key, ...]) -> tuple[Key, ...]:
    """Return ``keys`` without defaults: what is not said of the reference follows from the actor."""
    return of_second_model(tuple(Key(k.name, k.ours, k.convert, old=k.old, meaning=k.meaning) for k in keys))


def of_second_model(keys: tuple[Key, ...]) -> tuple[Key, ...]:
    """Return ``keys`` of the reference's engine, which set nothing where the actor is the reference."""

    def unless_actor(convert: Convert) -> Convert:
        def checked(value: Any, verl: VerlView) -> Any:
            if verl.actor_is_reference:
                raise NothingToSet("with lora_rank the reference is the actor without its adapters, as in verl")
            return convert(value, verl)

        return checked

    return tuple(replace(one, convert=unless_actor(one.convert)) for one in keys)


def compute_keys(section: str) -> tuple[Key, ...]:
    """Return the keys about kernels of the actor or the reference."""
    return (
        already(f"{section}.use_torch_compile", "layers run uncompiled"),
        already(f"{section}.entropy_checkpointing", IN_CHUNKS),
        already(f"{section}.entropy_from_logits_with_chunking", IN_CHUNKS),
        already(f"{section}.entropy_from_logits_chunk_size", IN_CHUNKS),
        already(f"{section}.pad_to_length", PACKED),
        already(f"{section}.use_remove_padding", PACKED),
        already(f"{section}.truncate_padding", PACKED),
        already(f"{section}.use_fused_kernels", "kernels change the speed, not the result"),
        already_if(f"{section}.ulysses_sequence_parallel_size", (1, None), "sequences stay on one GPU", ULYSSES),
        already(f"{section}.nccl_timeout", "calls end after controller.call_timeout_s, an hour by default"),
        already_if(
            f"{section}.load_weight", (True,), "models start from their folder", "models start from their folder"
        ),
        router_replay(section),
        without(f"{section}.profiler.*", TRACE, switch=f"{section}.profiler.enable"),
    )


_KL = (f"{losses.OBJECTIVE}.kl_loss.coeff", f"{losses.OBJECTIVE}.kl_loss.estimator")
_AGGREGATION = (f"{losses.OBJECTIVE}.aggregation.name", f"{losses.OBJECTIVE}.aggregation.max_length")

KEYS: tuple[Key, ...] = (
    key(f"{ACTOR}.strategy", "actor.engine", strategy, default="fsdp", meaning="fsdp and fsdp2 are fsdp"),
    key(f"{ACTOR}.ppo_mini_batch_size", "actor.mini_batch_size", mini_batch, differs=256, meaning="prompts in both"),
    key(f"{ACTOR}.ppo_epochs", "actor.epochs", default=1),
    *micro_batch_keys(
        ACTOR,
        "ppo_",
        "actor",
        dynamic="use_dynamic_bsz",
        default_tokens=16384,
        switch_default=False,
        tokens="ppo_max_token_len_per_gpu",
    ),
    key(
        f"{ACTOR}.policy_loss.loss_mode",
        f"{losses.LOSS}.name",
        losses.loss_mode,
        differs="vanilla",
        meaning="vanilla: ppo",
    ),
    key(
        f"{ACTOR}.clip_ratio",
        (f"{losses.LOSS}.clip_low", f"{losses.LOSS}.clip_high"),
        losses.clip_ratio,
        default=0.2,
        meaning="only where clip_ratio_low or clip_ratio_high is null",
    ),
    key(f"{ACTOR}.clip_ratio_low", f"{losses.LOSS}.clip_low", losses.clip_bound("low"), differs=0.2),
    key(f"{ACTOR}.clip_ratio_high", f"{losses.LOSS}.clip_high", losses.clip_bound("high"), differs=0.2),
    key(f"{ACTOR}.clip_ratio_c", f"{losses.LOSS}.dual_clip", losses.parameter("ppo", "dual_clip"), differs=3.0),
    key(
        f"{ACTOR}.tau_pos",
        f"{losses.LOSS}.tau_positive",
        losses.parameter("sapo", "tau_positive"),
        differs=1.0,
        old=(f"{ACTOR}.policy_loss.tau_pos",),
    ),
    key(
        f"{ACTOR}.tau_neg",
        f"{losses.LOSS}.tau_negative",
        losses.parameter("sapo", "tau_negative"),
        differs=1.05,
        old=(f"{ACTOR}.policy_loss.tau_neg",),
    ),
    key(f"{ACTOR}.loss_agg_mode", _AGGREGATION, losses.aggregation, differs="token-mean"),
    key(f"{ACTOR}.loss_scale_factor", _AGGREGATION[1], losses.scale_factor),
    key(f"{ACTOR}.entropy_coeff", "actor.objective.entropy_coeff", differs=0, old=(f"{ACTOR}.entropy_coef",)),
    key(f"{ACTOR}.use_kl_loss", _KL[0], losses.kl_loss, differs=False, meaning="False: coeff 0"),
    key(f"{ACTOR}.kl_loss_coef", _KL[0], losses.kl_coefficient, default=0.001, meaning="with use_kl_loss only"),
    key(f"{ACTOR}.kl_loss_type", _KL[1], losses.kl_estimator, differs="low_var_kl", meaning="low_var_kl: k3"),
    *optim_keys(f"{ACTOR}.optim", "actor", 1e-6, clip=(f"{ACTOR}.grad_clip",)),
    *fsdp_keys(f"{ACTOR}.fsdp_config", "actor"),
    *megatron_keys(f"{ACTOR}.megatron", "actor"),
    *compute_keys(ACTOR),
    key(f"{ACTOR}.checkpoint.save_contents", "trainer.save_hf", saved, old=(f"{ACTOR}.checkpoint.contents",)),
    key(f"{ACTOR}.checkpoint.async_save", "trainer.async_save"),
    already(f"{ACTOR}.checkpoint.load_contents", "a checkpoint is read as a whole"),
    already(f"{ACTOR}.checkpoint.strict", "weights that are missing or unknown are errors"),
    already(f"{ACTOR}.checkpoint.fully_parallel_save", "every process writes its part of a checkpoint"),
    already(f"{ACTOR}.checkpoint.fully_parallel_load", "every process reads its part of a checkpoint"),
    already(f"{ACTOR}.checkpoint.mbridge_config.*", "Hugging Face folders are read and written without a bridge"),
    already_if(
        f"{ACTOR}.shuffle",
        (False,),
        "mini-batches keep the order",
        "mini-batches keep the order of the batch",
    ),
    already(f"{ACTOR}.data_loader_seed", "mini-batches keep the order of the batch"),
    already(f"{ACTOR}.rollout_n", "it is rollout.n"),
    already(f"{ACTOR}.calculate_entropy", "the entropy is always a metric"),
    already(f"{ACTOR}.use_prefix_grouper", "every prefix of a micro-batch is always computed once"),
    already(f"{ACTOR}.calculate_sum_pi_squared", "it is computed where an estimator needs it"),
    already(f"{ACTOR}.sum_pi_squared_checkpointing", "it saves memory; the result is the same"),
    *losses.COVARIANCE_KEYS,
    without(f"{ACTOR}.policy_loss.*", "a parameter of a policy loss that rlcore has under another form, or lacks"),
    without(f"{ACTOR}.freeze_vision_tower", "vision models are not supported", off=(False,)),
    without(f"{ACTOR}.num_images_in_input", "vision models are not supported"),
    *(
        without(f"{role}.{engine}.*", "the training engines are fsdp and megatron")
        for role in (ACTOR, REF)
        for engine in ("veomni", "torchtitan", "automodel", "deepspeed", "mindspeed", "hyperparallel")
    ),
    quantisation_aware(ACTOR),
    without(f"{ACTOR}.use_rollout_log_probs", "set actor.old_logprobs=rollout", off=(False,)),
    # --- the reference -----------------------------------------------------------------------------------------------
    *of_second_model((key(f"{REF}.strategy", "ref.engine", ref_strategy),)),
    key(f"{REF}.model.path", "ref.model.path"),
    *of_second_model(
        micro_batch_keys(
            REF,
            "log_prob_",
            "ref",
            dynamic="log_prob_use_dynamic_bsz",
            tokens="log_prob_max_token_len_per_gpu",
            default_tokens="${actor_rollout_ref.actor.ppo_max_token_len_per_gpu}",
            switch_default="${actor_rollout_ref.actor.use_dynamic_bsz}",
        )
    ),
    *for_reference(fsdp_keys(f"{REF}.fsdp_config", "ref")),
    *for_reference(megatron_keys(f"{REF}.megatron", "ref")),
    *compute_keys(REF),
    already(f"{REF}.rollout_n", "it is rollout.n"),
)
