"""``*.fsdp_config.*`` and ``*.megatron.*``: sharding and precision of one role."""

from __future__ import annotations

from typing import Any

from rlcore_recipes.from_verl.keys.entries import (
    Convert,
    Key,
    NoEquivalent,
    NothingToSet,
    already,
    already_if,
    key,
    unchanged,
    without,
)
from rlcore_recipes.from_verl.values import flag, whole
from rlcore_recipes.from_verl.view import VerlView

DTYPES = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
ULYSSES = (
    "sequences are divided over GPUs by Megatron's context parallelism only (actor.engine=megatron "
    "actor.megatron.context_parallel=…)"
)
PACKED = "sequences are always packed without padding"
RESHARD = "every checkpoint can be read on another number of GPUs"
IN_CHUNKS = "logits and entropy are always computed in chunks (logits_chunk)"


def only(engine: str, convert: Convert = unchanged) -> Convert:
    """Return ``convert`` for a key that verl reads with one strategy only."""

    def checked(value: Any, verl: VerlView) -> Any:
        if verl.engine != engine:
            raise NothingToSet(f"verl does not read it with strategy {verl.engine}")
        return convert(value, verl)

    return checked


def dtype(value: Any, verl: VerlView) -> str:
    """Return a precision under its name in torch."""
    if str(value) not in DTYPES:
        raise NoEquivalent(f"precisions are {', '.join(sorted(set(DTYPES.values())))}")
    return DTYPES[str(value)]


def replicas(value: Any, verl: VerlView) -> int:
    """Return the replicas of hybrid sharding over groups of ``value`` GPUs."""
    size = whole(value, "fsdp_size")
    if size <= 0 or size >= verl.processes:
        return 1
    if verl.processes % size:
        raise NoEquivalent(f"{verl.processes} GPUs are no multiple of fsdp_size={size}")
    return verl.processes // size


def fsdp_keys(section: str, ours: str) -> tuple[Key, ...]:
    """Return the keys of FSDP of one role: ``section`` of verl, ``ours`` the role's section in rlcore."""
    return (
        *offload_keys(section, "fsdp", ours),
        key(
            f"{section}.offload_policy",
            f"{ours}.fsdp.offload_params",
            only("fsdp"),
            default=False,
            old=(f"{section}.cpu_offload", f"{section}.offload_params"),
        ),
        key(f"{section}.reshard_after_forward", f"{ours}.fsdp.reshard_after_forward", only("fsdp"), default=True),
        key(
            f"{section}.fsdp_size",
            f"{ours}.fsdp.replicate",
            only("fsdp", replicas),
            default=-1,
            meaning="GPUs of a replica; ours is the number of replicas",
        ),
        key(f"{section}.model_dtype", f"{ours}.fsdp.master_dtype", only("fsdp", dtype), default="fp32"),
        key(
            f"{section}.dtype",
            f"{ours}.fsdp.param_dtype",
            only("fsdp", dtype),
            old=(f"{section}.mixed_precision.param_dtype",),
        ),
        key(f"{section}.mixed_precision.reduce_dtype", f"{ours}.fsdp.reduce_dtype", only("fsdp", dtype)),
        already(f"{section}.mixed_precision.buffer_dtype", "buffers keep the model's precision"),
        already(f"{section}.forward_prefetch", "FSDP2 gathers the next layer during this one's computation"),
        already(f"{section}.use_orig_params", "FSDP2 keeps the original parameters"),
        already(f"{section}.wrap_policy.*", "every layer is sharded separately"),
        already(f"{section}.use_torch_compile", "layers run uncompiled"),
        already(f"{section}.strategy", "the engine is FSDP2"),
        already(f"{section}.entropy_from_logits_with_chunking", IN_CHUNKS),
        already(f"{section}.entropy_from_logits_chunk_size", IN_CHUNKS),
        already(f"{section}.entropy_checkpointing", IN_CHUNKS),
        already(f"{section}.use_no_sync_for_gradient_accumulation", "gradients are reduced once per optimizer step"),
        already(f"{section}.pad_to_length", PACKED),
        already(f"{section}.pad_to_length_bucket", PACKED),
        already(f"{section}.turbo_config.*", "verl reads it with strategy=fsdp_turbo only"),
        already(f"{section}.forward_only", "the reference is never trained"),
        already(f"{section}.seed", "all seeds follow from the run's seed"),
        already_if(f"{section}.full_determinism", (False,), "kernels may be non-deterministic", "no such switch"),
        already_if(
            f"{section}.ulysses_sequence_parallel_size",
            (1, None),
            "sequences stay on one GPU",
            ULYSSES,
        ),
        quantisation_aware(section),
    )


def quantisation_aware(section: str) -> Key:
    """Return the entry of the keys of quantisation-aware training in ``section``."""
    reason = "quantisation-aware training is not supported"
    return without(f"{section}.qat.*", reason, switch=f"{section}.qat.enable")


def router_replay(section: str) -> Key:
    """Return the entry of the keys about recorded routes of experts in ``section``."""
    reason = "routes of experts are not replayed"
    return without(f"{section}.router_replay.*", reason, switch=f"{section}.router_replay.mode")


def recompute(value: Any, verl: VerlView) -> str:
    """Return which activations Megatron recomputes."""
    if value is None:
        return "none"
    if value not in ("full", "selective"):
        raise NoEquivalent("activations are recomputed none, selective or full")
    return str(value)


def virtual_stages(value: Any, verl: VerlView) -> int:
    """Return Megatron's chunks of layers per stage."""
    return 1 if value is None else whole(value, "virtual_pipeline_model_parallel_size")


def switched(value: Any, verl: VerlView) -> bool:
    """Return whether a state is offloaded to host memory."""
    if value is None:
        raise NothingToSet("null leaves it to offload.*.target")
    return flag(value)


def target(value: Any, verl: VerlView) -> bool:
    """Return whether a state is offloaded to host memory, by the name of its target."""
    if value is None:
        raise NothingToSet("null leaves it to param_offload and optimizer_offload")
    if value == "disk":
        raise NoEquivalent("states are offloaded to host memory, not to disks")
    return str(value) == "cpu"


def offload_keys(section: str, engine: str, ours: str) -> tuple[Key, ...]:
    """Return the keys of one role about what waits in host memory between its turns."""
    weights, states = f"{ours}.offload", f"{ours}.{engine}.offload_optimizer"
    freed = "gradients are freed after every optimizer step, and offload moves the rest"
    return (
        key(f"{section}.param_offload", weights, switched, default=False, meaning="between its turns"),
        key(f"{section}.optimizer_offload", states, only(engine, switched), default=False),
        already(f"{section}.grad_offload", freed),
        key(f"{section}.offload.param.target", weights, only(engine, target), meaning="cpu: true"),
        already(f"{section}.offload.grad.target", freed),
        key(f"{section}.offload.optimizer.target", states, only(engine, target), meaning="cpu: true"),
        already(f"{section}.offload.disk.*", "verl reads it with the target disk only"),
    )


def sequence_parallel(section: str) -> Convert:
    """Return the conversion of the switch that divides norms too; without tensor parallelism nothing is divided."""

    def convert(value: Any, verl: VerlView) -> bool:
        own, actors = (f"{name}.tensor_model_parallel_size" for name in (section, "actor_rollout_ref.actor.megatron"))
        if not flag(value) or whole(verl.get(own) or verl.get(actors) or 1, own) < 2:
            raise NothingToSet("there is no tensor parallelism")
        return True

    return convert


def megatron_keys(section: str, ours: str) -> tuple[Key, ...]:
    """Return the keys of Megatron of one role: ``section`` of verl, ``ours`` the role's section in rlcore."""
    mine, transformer = f"{ours}.megatron", f"{section}.override_transformer_config"
    sizes = {
        "tensor_model_parallel_size": "tensor_parallel",
        "pipeline_model_parallel_size": "pipeline_parallel",
        "context_parallel_size": "context_parallel",
        "expert_model_parallel_size": "expert_parallel",
    }
    chunks = f"{section}.virtual_pipeline_model_parallel_size"
    return (
        *(key(f"{section}.{size}", f"{mine}.{name}", only("megatron"), default=1) for size, name in sizes.items()),
        key(chunks, f"{mine}.virtual_pipeline", only("megatron", virtual_stages)),
        key(f"{section}.expert_tensor_parallel_size", f"{mine}.expert_tensor_parallel", only("megatron")),
        key(
            f"{section}.sequence_parallel",
            f"{mine}.sequence_parallel",
            only("megatron", sequence_parallel(section)),
            default=True,
        ),
        key(f"{section}.use_distributed_optimizer", f"{mine}.distributed_optimizer", only("megatron"), default=True),
        *offload_keys(section, "megatron", ours),
        key(f"{section}.dtype", f"{mine}.dtype", only("megatron", dtype)),
        key(f"{section}.seed", "seed"),
        key(f"{transformer}.recompute_granularity", f"{mine}.recompute", only("megatron", recompute)),
        already(f"{transformer}.use_flash_attn", "attention has the fastest kernel that there is"),
        already(f"{transformer}.variable_seq_lengths", "packed rows differ in length"),
        without(f"{transformer}.moe_aux_loss_coeff", "the router's auxiliary loss is not part of the objective"),
        key(f"{transformer}.*", f"{mine}.transformer.*", only("megatron")),
        key(f"{section}.override_ddp_config.*", f"{mine}.ddp.*", only("megatron")),
        *_other_megatron_keys(section),
    )


def _other_megatron_keys(section: str) -> tuple[Key, ...]:
    """Return the keys for which there is nothing to set, or no equivalent."""
    folders = "models are Hugging Face folders: model.path"
    return (
        already(f"{section}.use_mbridge", "Hugging Face folders are read and written without a bridge"),
        already(f"{section}.vanilla_mbridge", "Hugging Face folders are read and written without a bridge"),
        already(f"{section}.entropy_from_logits_with_chunking", IN_CHUNKS),
        already(f"{section}.entropy_from_logits_chunk_size", IN_CHUNKS),
        already(f"{section}.use_remove_padding", PACKED),
        already(f"{section}.pad_bshd_to_minibatch_max", PACKED),
        already(f"{section}.pad_to_length", PACKED),
        already(f"{section}.pad_to_length_bucket", PACKED),
        already(f"{section}.forward_only", "the reference is never trained"),
        already_if(f"{section}.use_dist_checkpointing", (False,), folders, folders),
        without(f"{section}.dist_checkpointing_path", folders),
        without(f"{section}.dist_checkpointing_prefix", folders, off=("",)),
        already(f"{section}.dist_ckpt_optim_fully_reshardable", RESHARD),
        already(f"{section}.distrib_optim_fully_reshardable_mem_efficient", RESHARD),
        without(
            f"{section}.override_mcore_model_config.*", "set fields of TransformerConfig: actor.megatron.transformer"
        ),
        without(f"{section}.use_megatron_fsdp", "FSDP is a training engine: actor.engine=fsdp", off=(False,)),
        router_replay(section),
        quantisation_aware(section),
        without(f"{section}.dynamic_context_parallel", "context parallelism is constant", off=(False,)),
        without(
            f"{section}.max_seqlen_per_dp_cp_rank",
            "context parallelism is constant",
            switch=f"{section}.dynamic_context_parallel",
        ),
    )
