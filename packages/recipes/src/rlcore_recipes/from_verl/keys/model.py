"""``actor_rollout_ref.model.*``: the policy's model and its adapters."""

from __future__ import annotations

from typing import Any

from rlcore_recipes.from_verl.keys.entries import (
    Convert,
    Key,
    NoEquivalent,
    NothingToSet,
    Several,
    already,
    already_if,
    key,
    without,
)
from rlcore_recipes.from_verl.values import flag, whole
from rlcore_recipes.from_verl.view import VerlView

POLICY = "actor_rollout_ref.model"
KERNELS = "kernels change the speed, not the result: rlcore bounds the memory of logits by chunks (logits_chunk)"
PACKED = "sequences are always packed without padding; the result is the same"
TEMPLATE = "the template is the tokenizer's: put it into the tokenizer's folder"
NO_OVERRIDE = "the model is as its folder says: change the folder's config.json"


def checkpointing(value: Any, verl: VerlView) -> bool:
    """Return whether layers are recomputed in the backward pass."""
    if verl.engine == "megatron":
        raise NothingToSet("with Megatron, override_transformer_config.recompute_granularity decides, as in verl")
    return flag(value)


def lora(ours: str, section: str) -> Convert:
    """Return the conversion of the adapters' keys of a role, which are read together."""

    def convert(value: Any, verl: VerlView) -> Several:
        rank = whole(verl.get(f"{section}.lora_rank") or 0, f"{section}.lora_rank")
        if rank <= 0:
            raise NothingToSet("with lora_rank=0 all weights are trained")
        if verl.engine == "megatron":
            raise NoEquivalent("only the FSDP engine trains adapters")
        targets = verl.get(f"{section}.target_modules")
        found = Several({f"{ours}.fsdp.lora.rank": rank, f"{ours}.fsdp.lora.alpha": verl.get(f"{section}.lora_alpha")})
        if targets not in (None, "all-linear"):
            found[f"{ours}.fsdp.lora.target_modules"] = targets if isinstance(targets, list) else [str(targets)]
        if section == POLICY and verl.rollout_engine == "vllm":
            found["rollout.vllm.enable_lora"] = True
        return found

    return convert


def model_keys(section: str, path: str, ours: str) -> tuple[Key, ...]:
    """Return the keys of the model of one role.

    Args:
        section: of verl, such as ``actor_rollout_ref.model``.
        path: section of the model in rlcore: ``model`` or ``critic.model``.
        ours: section of the role in rlcore.
    """
    adapters = tuple(f"{ours}.fsdp.lora.{name}" for name in ("rank", "alpha", "target_modules"))
    if section == POLICY:
        adapters = (*adapters, "rollout.vllm.enable_lora")
    convert = lora(ours, section)
    return (
        key(f"{section}.path", f"{path}.path"),
        key(f"{section}.tokenizer_path", f"{path}.tokenizer_path"),
        key(f"{section}.trust_remote_code", f"{path}.trust_remote_code", default=False),
        key(f"{section}.override_config.attn_implementation", f"{path}.attn_implementation"),
        key(
            f"{section}.enable_gradient_checkpointing",
            f"{ours}.fsdp.gradient_checkpointing",
            checkpointing,
            differs=True,
        ),
        key(f"{section}.lora_rank", adapters, convert, default=0, meaning="0: all weights"),
        key(f"{section}.lora_alpha", adapters, convert, default=16),
        key(f"{section}.target_modules", adapters, convert, default="all-linear", meaning="all-linear: null"),
        *_other_keys(section),
    )


def _other_keys(section: str) -> tuple[Key, ...]:
    """Return the keys for which there is nothing to set, or no equivalent."""
    stay = "activations stay on the GPU"
    return (
        already(f"{section}.use_remove_padding", PACKED),
        already(f"{section}.truncate_padding", PACKED),
        already(f"{section}.use_liger", KERNELS),
        already(f"{section}.use_fused_kernels", KERNELS),
        already(f"{section}.fused_kernel_options.*", KERNELS),
        already(f"{section}.tiled_mlp.*", KERNELS),
        already_if(f"{section}.enable_activation_offload", (False,), stay, f"{stay}, or are recomputed"),
        already(f"{section}.use_shm", "the model's files are memory-mapped where they are"),
        without(f"{section}.override_config.moe_config.freeze_moe_router", NO_OVERRIDE, off=(False,)),
        without(f"{section}.override_config.*", NO_OVERRIDE, old=(f"{section}.override_config",)),
        without(f"{section}.hf_config_path", NO_OVERRIDE),
        without(f"{section}.torch_dtype", "precision is param_dtype and master_dtype of the engine's section"),
        without(f"{section}.exclude_modules", "name the layers that get adapters: actor.fsdp.lora.target_modules"),
        without(f"{section}.lora_adapter_path", "adapters start new: merge the old ones into the model first"),
        without(
            f"{section}.lora.*",
            "the Megatron engine trains all weights; adapters are FSDP's: actor.fsdp.lora",
            switch=f"{section}.lora.rank",
        ),
        without(f"{section}.external_lib", "a package with an entry point is found without being named"),
        without(f"{section}.custom_chat_template", TEMPLATE),
        without(f"{section}.mtp.*", "multi-token prediction is not supported", switch=f"{section}.mtp.enable"),
        without(f"{section}.gradient_checkpointing_kwargs.*", "layers are recomputed as a whole"),
    )


KEYS: tuple[Key, ...] = (
    *model_keys(POLICY, "model", "actor"),
    already("actor_rollout_ref.nccl_timeout", "calls end after controller.call_timeout_s, an hour by default"),
    already("actor_rollout_ref.hybrid_engine", "whether rollout and policy share GPUs follows from controller.pools"),
    already_if(
        "model_engine",
        ("dp", "fsdp", "megatron"),
        "the training engine is actor.engine",
        "the training engines are fsdp and megatron; this run uses fsdp",
    ),
)
