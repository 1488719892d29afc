"""TRL's and OpenRLHF's arguments, and the keys of rlcore that do the same.

Those of verl are in `rlcore_recipes.from_verl.keys`. An argument that has the name of the key, such as ``temperature``,
needs no entry.
"""

from __future__ import annotations

from typing import NamedTuple


class Equivalent(NamedTuple):
    """What an argument of another framework is here.

    Attributes:
        ours: keys of rlcore; empty if there is none.
        remark: how the value differs, or why there is no key.
    """

    ours: tuple[str, ...]
    remark: str = ""


def _is(*ours: str, remark: str = "") -> Equivalent:
    return Equivalent(ours, remark)


_PROMPTS = "counts prompts over all devices, each with rollout.n completions; in sft samples"
_SAMPLES = "its samples are prompts × completions, over all devices; rlcore's number counts prompts"
_BUDGET = "a token budget instead of a number of sequences; results do not depend on it"
_CLIP = ("actor.objective.policy_loss.clip_low", "actor.objective.policy_loss.clip_high")

TRL: dict[str, Equivalent] = {
    "model_name_or_path": _is("model.path"),
    "dataset_name": _is("data.train_files", remark="hub:name for a data set of the Hub"),
    "dataset_test_split": _is("data.val_files", remark="hub:name@split"),
    "dataset_text_field": _is("data.text_key"),
    "learning_rate": _is("actor.optim.lr"),
    "lr_scheduler_type": _is("actor.optim.schedule", remark="constant, linear or cosine"),
    "lr_scheduler_kwargs": _is("actor.optim.schedule", "actor.optim.min_lr_ratio"),
    "adam_beta1": _is("actor.optim.betas", remark="both in a list"),
    "adam_beta2": _is("actor.optim.betas", remark="both in a list"),
    "adam_epsilon": _is("actor.optim.eps"),
    "max_grad_norm": _is("actor.optim.clip_grad"),
    "per_device_train_batch_size": _is("data.train_batch_size", remark=_PROMPTS),
    "per_device_eval_batch_size": _is("data.val_batch_size", remark="counts prompts, over all devices"),
    "gradient_accumulation_steps": _is("actor.mini_batch_size", remark=f"{_PROMPTS}; micro-batches follow from memory"),
    "generation_batch_size": _is("data.train_batch_size", remark=_SAMPLES),
    "steps_per_generation": _is("actor.mini_batch_size", remark="a batch is divided into mini-batches of prompts"),
    "num_iterations": _is("actor.epochs"),
    "num_ppo_epochs": _is("actor.epochs"),
    "num_train_epochs": _is("trainer.total_epochs"),
    "max_tool_calling_iterations": _is("rollout.environment.max_turns", remark="counts completions"),
    "max_steps": _is("trainer.total_steps", remark="counts batches of prompts, not optimizer steps"),
    "num_generations": _is("rollout.n"),
    "num_generations_eval": _is("rollout.validation.n"),
    "max_completion_length": _is("data.max_response_length"),
    "max_new_tokens": _is("data.max_response_length"),
    "response_length": _is("data.max_response_length"),
    "max_seq_length": _is("data.max_length"),
    "beta": _is("actor.objective.kl_loss.coeff"),
    "epsilon": _is(*_CLIP, remark="both sides"),
    "epsilon_high": _is(_CLIP[1]),
    "delta": _is("actor.objective.policy_loss.dual_clip"),
    "cliprange": _is(*_CLIP, remark="both sides"),
    "cliprange_value": _is("critic.objective.value_loss.clip_range"),
    "vf_coef": _is("critic.objective.coeff"),
    "kl_coef": _is("algorithm.kl_in_reward.coeff"),
    "kl_estimator": _is("algorithm.kl_in_reward.estimator"),
    "whiten_rewards": _is("algorithm.advantage.whiten", remark="whitens advantages"),
    "loss_type": _is(
        "actor.objective.aggregation",
        remark="grpo: seq-mean-token-mean, dapo: token-mean, dr_grpo: seq-mean-token-sum-norm; cispo and sapo are "
        "values of actor.objective.policy_loss",
    ),
    "scale_rewards": _is("algorithm.advantage.normalize_std", remark="true or false, within a group"),
    "importance_sampling_level": _is("actor.objective.policy_loss", remark="sequence: gspo"),
    "vllm_importance_sampling_correction": _is("actor.objective.correction", remark="tis, mis, icepop or null"),
    "vllm_importance_sampling_mode": _is("actor.objective.correction", remark="tis truncates, mis and icepop mask"),
    "vllm_importance_sampling_cap": _is("actor.objective.correction.cap"),
    "reward_funcs": _is("reward.path", remark="file.py:function"),
    "reward_weights": _is("reward.combine.rewards", remark="each with a weight"),
    "reward_model_path": _is("reward_model.model.path"),
    "use_vllm": _is("rollout.engine", remark="vllm"),
    "vllm_mode": _is("rollout.vllm.mode", remark="colocate: in_process; server: server"),
    "vllm_server_base_url": _is("rollout.vllm.server.urls"),
    "vllm_gpu_memory_utilization": _is("rollout.vllm.gpu_memory_utilization"),
    "vllm_tensor_parallel_size": _is("rollout.vllm.tensor_parallel_size"),
    "vllm_enable_sleep_mode": _is("rollout.free_memory"),
    "bf16": _is("actor.fsdp.param_dtype", remark="bfloat16; the default on a GPU"),
    "use_peft": _is("actor.fsdp.lora", remark="keys, or null"),
    "lora_r": _is("actor.fsdp.lora.rank"),
    "lora_alpha": _is("actor.fsdp.lora.alpha"),
    "lora_dropout": _is("actor.fsdp.lora.dropout"),
    "lora_target_modules": _is("actor.fsdp.lora.target_modules"),
    "peft_config": _is("actor.fsdp.lora"),
    "output_dir": _is("trainer.out_dir"),
    "run_name": _is("trainer.name"),
    "report_to": _is("trainer.trackers"),
    "save_steps": _is("trainer.save_freq"),
    "save_total_limit": _is("trainer.keep_checkpoints"),
    "eval_steps": _is("trainer.test_freq"),
    "eval_on_start": _is("trainer.val_before_train"),
    "resume_from_checkpoint": _is("trainer.resume"),
    "metric_for_best_model": _is("trainer.best_metric"),
    "greater_is_better": _is("trainer.best_mode", remark="max or min"),
    "log_completions": _is("trainer.log_val_generations", remark="completions of validation, as a number"),
    "push_to_hub": _is(remark="`rlcore export` writes and uploads a model"),
    "shuffle_dataset": _is("data.shuffle"),
    "assistant_only_loss": _is("data.messages_key", remark="conversations are trained on the assistant's turns only"),
    "packing": _is(remark="nothing to set: sequences are always packed without padding"),
    "logging_steps": _is(remark="nothing to set: every step is logged"),
    "mask_truncated_completions": _is("algorithm.overlong", remark="long completions are punished, not masked"),
}
"""Arguments of TRL's GRPOConfig, SFTConfig, PPOConfig and scripts."""

OPENRLHF: dict[str, Equivalent] = {
    "pretrain": _is("model.path"),
    "critic_pretrain": _is("critic.model.path"),
    "reward_pretrain": _is("reward_model.model.path"),
    "remote_rm_url": _is("reward.path", remark="a function; it may call a server"),
    "prompt_data": _is("data.train_files"),
    "prompt_data_probs": _is("data.weights"),
    "dataset": _is("data.train_files"),
    "eval_dataset": _is("data.val_files"),
    "input_key": _is("data.prompt_key"),
    "label_key": _is("data.ground_truth_key"),
    "output_key": _is("data.response_key"),
    "input_template": _is("data.system_prompt", "data.apply_chat_template"),
    "prompt_max_len": _is("data.max_prompt_length"),
    "generate_max_len": _is("data.max_response_length"),
    "max_len": _is("data.max_length"),
    "rollout_batch_size": _is("data.train_batch_size", remark="prompts in both"),
    "train_batch_size": _is("actor.mini_batch_size", remark=_SAMPLES),
    "micro_train_batch_size": _is("actor.max_tokens_per_micro_batch", remark=_BUDGET),
    "micro_rollout_batch_size": _is("actor.max_tokens_per_micro_batch", remark=_BUDGET),
    "train_max_tokens_per_gpu": _is("actor.max_tokens_per_micro_batch"),
    "n_samples_per_prompt": _is("rollout.n"),
    "eval_n_samples_per_prompt": _is("rollout.validation.n"),
    "eval_temperature": _is("rollout.validation.temperature"),
    "max_epochs": _is("actor.epochs"),
    "num_episodes": _is("trainer.total_epochs"),
    "actor_learning_rate": _is("actor.optim.lr"),
    "critic_learning_rate": _is("critic.optim.lr"),
    "lr_warmup_ratio": _is("actor.optim.warmup_ratio"),
    "lr_scheduler": _is("actor.optim.schedule", remark="constant, linear or cosine, with min_lr_ratio"),
    "adam_betas": _is("actor.optim.betas"),
    "l2": _is("actor.optim.weight_decay"),
    "max_norm": _is("actor.optim.clip_grad"),
    "init_kl_coef": _is(
        "algorithm.kl_in_reward.coeff", remark="in the reward; with use_kl_loss it is actor.objective.kl_loss.coeff"
    ),
    "kl_target": _is("algorithm.kl_in_reward.target"),
    "kl_horizon": _is("algorithm.kl_in_reward.horizon"),
    "use_kl_loss": _is("actor.objective.kl_loss.coeff", remark="above 0 switches the term on"),
    "advantage_estimator": _is(
        "algorithm.advantage",
        remark="group_norm: grpo; reinforce_baseline: "
        "reinforce_plus_plus_baseline; dr_grpo: grpo with normalize_std=false",
    ),
    "no_advantage_std_norm": _is("algorithm.advantage.normalize_std"),
    "lambd": _is("algorithm.advantage.lam"),
    "eps_clip": _is(*_CLIP, remark="both sides"),
    "eps_clip_low_high": _is(*_CLIP),
    "value_clip": _is("critic.objective.value_loss.clip_range"),
    "policy_loss_type": _is("actor.objective.policy_loss", remark="ppo or gspo"),
    "entropy_loss_coef": _is("actor.objective.entropy_coeff"),
    "freezing_actor_steps": _is("critic.warmup_steps"),
    "dynamic_filtering": _is("algorithm.dynamic_sampling", remark="recipe dapo"),
    "dynamic_filtering_reward_range": _is("algorithm.dynamic_sampling.filter", remark="mean-score with low and high"),
    "overlong_buffer_len": _is("algorithm.overlong.buffer"),
    "overlong_penalty_factor": _is("algorithm.overlong.factor"),
    "enable_vllm_is_correction": _is("actor.objective.correction", remark="tis"),
    "vllm_is_truncated_threshold": _is("actor.objective.correction.cap"),
    "async_train": _is("async.max_staleness", remark="1 or more"),
    "async_queue_size": _is("async.max_staleness"),
    "vllm_num_engines": _is("controller.pools", remark="one engine in each process of the rollout's pool"),
    "vllm_tensor_parallel_size": _is("rollout.vllm.tensor_parallel_size"),
    "vllm_gpu_memory_utilization": _is("rollout.vllm.gpu_memory_utilization"),
    "vllm_sync_backend": _is("weight_sync.transport"),
    "vllm_enable_sleep": _is("rollout.free_memory"),
    "colocate_all_models": _is("controller.placement", remark="roles on one pool share its processes"),
    "actor_num_nodes": _is("controller.pools", remark="processes = nodes × GPUs"),
    "actor_num_gpus_per_node": _is("controller.pools", remark="processes = nodes × GPUs"),
    "deepspeed_enable_sleep": _is("actor.offload"),
    "adam_offload": _is("actor.fsdp.offload_optimizer"),
    "zero_stage": _is("actor.fsdp.reshard_after_forward", remark="true is ZeRO-3, false ZeRO-2"),
    "ring_attn_size": _is("actor.megatron.context_parallel", remark="with actor.engine=megatron"),
    "ds_tensor_parallel_size": _is("actor.megatron.tensor_parallel", remark="with actor.engine=megatron"),
    "lora_rank": _is("actor.fsdp.lora.rank"),
    "packing_samples": _is(remark="nothing to set: sequences are always packed without padding"),
    "agent_func_path": _is("rollout.environment", remark="an environment is a class with the methods reset and step"),
    "save_path": _is("trainer.out_dir", remark="the model is in its folder model with trainer.save_hf=true"),
    "ckpt_path": _is("trainer.checkpoint_dir"),
    "save_hf_ckpt": _is("trainer.save_hf"),
    "max_ckpt_num": _is("trainer.keep_checkpoints"),
    "load_checkpoint": _is("trainer.resume", remark="auto, the default"),
    "use_wandb": _is("trainer.trackers", remark="with wandb among them"),
    "use_tensorboard": _is("trainer.trackers", remark="with tensorboard among them"),
    "wandb_project": _is("trainer.project"),
    "wandb_run_name": _is("trainer.name"),
    "wandb_org": _is("trainer.wandb.entity"),
    "wandb_group": _is("trainer.wandb.group"),
}
"""Arguments of OpenRLHF's train_ppo_ray and train_sft."""
