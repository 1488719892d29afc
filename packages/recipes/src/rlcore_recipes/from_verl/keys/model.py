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


MEGATRONS_LAYERS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Layers of transformers that Megatron's layers are."""


def lora(ours: str, section: str, engine: str) -> Convert:
    """Return the conversion of the adapters' keys of a role in ``engine``, which are read together."""
    mark = "lora." if engine == "megatron" else "lora_"
    adapters = f"{ours}.{engine}.lora"

    def convert(value: Any, verl: VerlView) -> Several:
        rank = whole(verl.get(f"{section}.{mark}rank") or 0, f"{section}.{mark}rank")
        if rank <= 0:
            raise NothingToSet(f"with {mark}rank=0 all weights are trained")
        if verl.engine != engine:
            raise NoEquivalent(f"with {verl.engine}, verl reads {'lora_rank' if engine == 'megatron' else 'lora.rank'}")
        name = f"{section}.lora.target_modules" if engine == "megatron" else f"{section}.target_modules"
        targets = verl.get(name)
        found = Several({f"{adapters}.rank": rank, f"{adapters}.alpha": verl.get(f"{section}.{mark}alpha")})
        if targets not in (None, "all-linear"):
            named = [str(target) for target in (targets if isinstance(targets, list) else [targets])]
            found[f"{adapters}.target_modules"] = [
                layer for target in named for layer in MEGATRONS_LAYERS.get(target, (target,))
            ]
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
    fsdp, megatron = (
        tuple(f"{ours}.{engine}.lora.{name}" for name in ("rank", "alpha", "target_modules"))
        + (("rollout.vllm.enable_lora",) if section == POLICY else ())
        for engine in ("fsdp", "megatron")
    )
    convert, convert_megatron = lora(ours, section, "fsdp"), lora(ours, section, "megatron")
    of_transformers = "one pair of matrices for each layer of transformers"
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
        key(f"{section}.lora_rank", fsdp, convert, default=0, meaning="0: all weights"),
        key(f"{section}.lora_alpha", fsdp, convert, default=16),
        key(f"{section}.target_modules", fsdp, convert, default="all-linear", meaning="all-linear: null"),
        key(
            f"{section}.lora.rank", megatron, convert_megatron, default=0, meaning=f"0: all weights; {of_transformers}"
        ),
        key(f"{section}.lora.alpha", megatron, convert_megatron, default=32),
        key(
            f"{section}.lora.target_modules", megatron, convert_megatron, meaning="linear_qkv: q_proj, k_proj, v_proj …"
        ),
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
            "adapters have rank, alpha and target_modules, and no dropout with Megatron: actor.megatron.lora",
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
