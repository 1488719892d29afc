"""Complete configurations of verl, which name every setting: what is off is no loss, and what is set counts."""

from __future__ import annotations

from typing import Any

import pytest

from rlcore_recipes.from_verl.assignment import Assignment, Translation, VerlCommand
from rlcore_recipes.from_verl.translate import NOTHING_TO_SET, translate

ACTOR, ROLLOUT, REF = ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref")
GRPO: dict[str, Any] = {
    "data.train_files": "train.parquet",
    "actor_rollout_ref.model.path": "/m",
    "algorithm.adv_estimator": "grpo",
    "trainer.n_gpus_per_node": 1,
}

UNUSED: dict[str, Any] = {
    # a switch that is off, and what is read with it only
    f"{ACTOR}.profiler": {"enable": False, "ranks": [], "tool_config": {"torch": {"discrete": False}}},
    f"{ACTOR}.router_replay": {"mode": "disabled", "record_file": None},
    f"{ACTOR}.fsdp_config": {
        "param_offload": None, "pad_to_length_bucket": 1024, "qat": {"enable": False, "group_size": 16},
        "offload": {"param": {"target": None}, "disk": {"chunk_size_mb": 64}},
        "turbo_config": {"distributed": {"fsdp_plan": {"param_dtype": "bf16"}}},
    },
    f"{ACTOR}.optim": {
        "override_optimizer_config": {}, "muon_momentum": 0.95, "lr_wsd_decay_style": "exponential",
        "weight_decay_incr_style": "constant",
    },
    f"{ACTOR}.policy_loss": {"clip_cov_lb": 1.0, "ppo_kl_coef": 0.1},
    f"{ROLLOUT}.engine_kwargs": {"vllm": {}, "sglang": {}, "trtllm": {}},
    f"{ROLLOUT}.multi_turn": {"enable": False, "max_parallel_calls": 1, "format": "hermes"},
    f"{ROLLOUT}.trace": {"backend": None, "token2text": False},
    f"{ROLLOUT}.skip": {"enable": False, "max_dump_step": 1},
    f"{REF}.megatron": {"override_ddp_config": {}, "dist_checkpointing_prefix": "", "max_seqlen_per_dp_cp_rank": None},
    "actor_rollout_ref.model": {"mtp": {"enable": False, "method": "mtp"}, "lora": {"rank": 0, "type": "lora"}},
    "critic": {"nccl_timeout": 600, "checkpoint": {"save_contents": ["model", "optimizer", "extra"]}},
    "data": {"custom_cls": {"path": None}, "image_key": "images", "sampler": {"class_path": None, "group_key": None}},
    "reward": {"compute_score_kwargs": {}, "reward_manager": {"source": "register", "module": {"name": "mine"}}},
    "reward_model": {"enable": None, "rollout": {"dtype": None}, "sandbox_fusion": {"url": None, "max_concurrent": 64}},
    "trainer.v1": {"trainer_mode": "sync", "sync": {}, "separate_async": {"parameter_sync_step": 4}},
    "distillation": {"enabled": False, "distillation_loss": {"topk": 32}},
    "transfer_queue": {"enable": False, "backend": {"storage_backend": "SimpleStorage"}},
    "global_profiler": {"steps": None, "save_path": "outputs/profile"},
}  # fmt: skip


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, inside in tree.items():
        found |= (
            flattened(inside, f"{prefix}{name}.") if isinstance(inside, dict) and inside else {prefix + name: inside}
        )
    return found


def translated(keys: dict[str, Any], entry: str = "verl.trainer.main_ppo") -> Translation:
    return translate(VerlCommand(entry, tuple(Assignment(key, value, "", "here") for key, value in keys.items())))


def reasons(found: Translation) -> dict[str, str]:
    return {lost.assignment.key: lost.reason for lost in found.untranslated}


def value(found: Translation, key: str) -> Any:
    inner: Any = found.config
    for name in key.split("."):
        inner = inner[name]
    return inner


def test_what_verl_does_not_use_is_no_loss() -> None:
    """A complete configuration, as Hydra saves it, names every setting; those that are off need none here."""
    unused = flattened(UNUSED)
    found = translated({**GRPO, **unused})
    assert found.config == translated(GRPO).config
    assert {key: why for key, why in reasons(found).items() if not why.startswith(NOTHING_TO_SET)} == {}
    assert len(found.untranslated) == len(unused)


@pytest.mark.parametrize(
    ("switch", "on", "read"),
    [
        (f"{ACTOR}.profiler.enable", True, f"{ACTOR}.profiler.ranks"),
        (f"{ACTOR}.router_replay.mode", "R2", f"{ACTOR}.router_replay.record_file"),
        (f"{ACTOR}.policy_loss.loss_mode", "clip_cov", f"{ACTOR}.policy_loss.clip_cov_lb"),
        (f"{ROLLOUT}.trace.backend", "weave", f"{ROLLOUT}.trace.token2text"),
        ("reward.reward_model.enable", True, "reward.reward_model.rollout.dtype"),
        ("trainer.v1.trainer_mode", "separate_async", "trainer.v1.separate_async.parameter_sync_step"),
        ("distillation.enabled", True, "distillation.distillation_loss.topk"),
    ],
)
def test_what_verl_uses_is_reported(switch: str, on: Any, read: str) -> None:
    assert not reasons(translated({**GRPO, switch: on, read: "x"}))[read].startswith(NOTHING_TO_SET)


@pytest.mark.parametrize(
    ("one", "other", "key", "ours"),
    [
        ({f"{ACTOR}.optim.lr_scheduler_type": "cosine"}, {f"{ACTOR}.optim.warmup_style": None},
         "actor.optim.schedule", "cosine"),
        ({f"{ACTOR}.optim.clip_grad": 0.5}, {f"{ACTOR}.grad_clip": 1.0}, "actor.optim.clip_grad", 0.5),
        ({f"{ACTOR}.grad_clip": 0.5}, {f"{ACTOR}.optim.clip_grad": 1.0}, "actor.optim.clip_grad", 0.5),
        ({"custom_reward_function.path": "r.py"}, {"reward.custom_reward_function.path": None},
         "reward.path", "r.py:compute_score"),
        ({f"{ACTOR}.fsdp_config.param_offload": True}, {f"{ACTOR}.fsdp_config.offload.param.target": None},
         "actor.offload", True),
        ({f"{ACTOR}.fsdp_config.offload.param.target": "cpu"}, {f"{ACTOR}.fsdp_config.param_offload": None},
         "actor.offload", True),
    ],
)  # fmt: skip
def test_of_two_names_of_a_key_the_one_that_is_set_counts(
    one: dict[str, Any], other: dict[str, Any], key: str, ours: Any
) -> None:
    assert value(translated({**GRPO, **one, **other}), key) == ours
    assert value(translated({**GRPO, **other, **one}), key) == ours


@pytest.mark.parametrize(("strategy", "size"), [("fsdp", None), ("megatron", 2)])
def test_a_section_of_either_engine_follows_the_strategy(strategy: str, size: int | None) -> None:
    engine = {"strategy": strategy, "sequence_parallel": True, "optimizer_offload": True}
    engine |= {"tensor_model_parallel_size": size} if size else {}
    keys = flattened({"data.train_files": "t.parquet", "model.path": "/m", "engine": engine})
    found = translated(keys, "verl.trainer.sft_trainer")
    assert value(found, f"actor.{strategy}.offload_optimizer") is True
    assert found.config["actor"].get("megatron", {}).get("sequence_parallel", False) is (strategy == "megatron")
