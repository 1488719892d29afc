"""The table of verl's keys: names, conversions, defaults, and that no key of a command is lost."""

from __future__ import annotations

from typing import Any

import pytest

from rlcore.config import Config, validate_config
from rlcore.config.keys import sections
from rlcore.errors import ConfigError
from rlcore_recipes.dapo import DAPOConfig
from rlcore_recipes.divisors import nearest_divisors
from rlcore_recipes.from_verl.assignment import Assignment, Translation, VerlCommand
from rlcore_recipes.from_verl.keys.entries import ANY, UNSET
from rlcore_recipes.from_verl.keys.table import reinforcement_table, supervised_table
from rlcore_recipes.from_verl.translate import NOTHING_TO_SET, translate
from rlcore_recipes.grpo import GRPOConfig
from rlcore_recipes.ppo import PPOConfig
from rlcore_recipes.settings.supervised import SFTConfig

ACTOR, ROLLOUT, REF = ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref")
FILES = {"data.train_files": "train.parquet", "data.val_files": "test.parquet", "actor_rollout_ref.model.path": "/m"}
GRPO = {**FILES, "algorithm.adv_estimator": "grpo", f"{ROLLOUT}.n": 4, "trainer.n_gpus_per_node": 1}
SFT_ENTRY = "verl.trainer.fsdp_sft_trainer"
MAIN = "verl.trainer.main_ppo"


def command(keys: dict[str, Any], entry: str = MAIN) -> VerlCommand:
    return VerlCommand(entry, tuple(Assignment(key, value, "", "here") for key, value in keys.items()))


def translated(keys: dict[str, Any], entry: str = MAIN) -> Translation:
    return translate(command(keys, entry))


def value(found: Translation, key: str) -> Any:
    """The value of a dotted key of rlcore; KeyError if it is not set."""
    inner: Any = found.config
    for name in key.split("."):
        inner = inner[name]
    return inner


def reason(found: Translation, key: str) -> str:
    [lost] = [lost for lost in found.untranslated if lost.assignment.key == key]
    return lost.reason


RECIPES: dict[str, type[Config]] = {"grpo": GRPOConfig, "ppo": PPOConfig, "dapo": DAPOConfig, "sft": SFTConfig}


# --- the table -------------------------------------------------------------------------------------------------------


def known_to_rlcore(name: str) -> set[str]:
    found = set()
    for section in sections(RECIPES[name]):
        found.add(section.path)
        found |= {f"{section.path}.{key.name}" if section.path else key.name for key in section.keys}
    return found


def test_every_key_of_rlcore_that_the_table_sets_exists() -> None:
    ours = {name: known_to_rlcore(name) for name in ("grpo", "ppo", "dapo", "sft")}
    for table, recipes in ((reinforcement_table(), ("grpo", "ppo", "dapo")), (supervised_table(), ("sft",))):
        known = set().union(*(ours[name] for name in recipes))
        mappings = {"args", "transformer", "optimizer", "ddp", "chat_template_kwargs", "kwargs"}
        for entry in table:
            for target in entry.ours:
                inside = any(part in mappings for part in target.split("."))
                assert target in known or target.endswith(".name") or inside, (entry.name, target)


def test_every_key_has_a_meaning_or_a_target() -> None:
    for table in (reinforcement_table(), supervised_table()):
        for entry in table:
            assert entry.ours or entry.meaning, entry.name
            assert not entry.written or entry.default is not UNSET


@pytest.mark.parametrize("entry", [MAIN, SFT_ENTRY])
def test_each_key_ends_in_exactly_one_place(entry: str) -> None:
    """Each known name is set to its default or to a number: it is in a comment, or among the untranslated, not both."""
    table = supervised_table() if entry == SFT_ENTRY else reinforcement_table()
    base = {"data.train_files": "t.parquet", "model.path": "/m"} if entry == SFT_ENTRY else GRPO
    for name in table.names:
        known = table.find(name)
        assert known is not None
        default = known.default if known.default not in (UNSET, None) and "$" not in str(known.default) else 1
        found = translated(
            {**{k: v for k, v in base.items() if table.canonical(k) != known.name}, name: default}, entry
        )
        commented = any(name in comment.split(", ") for comment in found.comments.values())
        lost = [lost for lost in found.untranslated if lost.assignment.key == name]
        assert (len(lost) == 1) != commented, name
        assert all(item.understood for item in lost), name


def test_keys_below_a_section_are_known_too() -> None:
    level = f"{ACTOR}.profiler.tool_config.npu.level"
    assert "trace=true" in reason(translated({**GRPO, f"{ACTOR}.profiler.enable": True, level: "level1"}), level)
    assert "profiler.enable=null" in reason(translated({**GRPO, level: "level1"}), level)
    assert all(name.endswith(ANY) or "*" not in name for name in reinforcement_table().names)


def test_an_unknown_key_is_reported_with_a_close_one() -> None:
    found = translated({**GRPO, "data.train_bach_size": 8, "my.own": 1})
    lost = {item.assignment.key: item for item in found.untranslated}
    assert not lost["data.train_bach_size"].understood
    assert "data.train_batch_size" in lost["data.train_bach_size"].reason
    assert not lost["my.own"].understood


def test_the_last_assignment_counts_and_the_earlier_is_reported() -> None:
    twice = (
        Assignment("data.train_batch_size", 8, "", "argument 1"),
        Assignment("data.train_batch_size", 16, "", "argument 2"),
    )
    found = translate(VerlCommand(MAIN, (*command(FILES).assignments, *twice)))
    assert value(found, "data.train_batch_size") == 16
    [lost] = [item for item in found.untranslated if item.assignment.key == "data.train_batch_size"]
    assert lost.assignment.value == 8
    assert "argument 2" in lost.reason


def test_a_dictionary_is_taken_apart() -> None:
    found = translated({**GRPO, f"{ROLLOUT}.val_kwargs": {"n": 4, "temperature": 0.6, "do_sample": True, "odd": 1}})
    assert value(found, "rollout.validation") == {"n": 4, "temperature": 0.6}
    assert not next(lost for lost in found.untranslated if lost.assignment.key.endswith("odd")).understood


def test_a_deleted_key_leaves_the_default() -> None:
    deleted = Assignment("trainer.total_training_steps", None, "~", "argument 9")
    found = translate(VerlCommand(MAIN, (*command({**GRPO, "trainer.total_training_steps": 5}).assignments, deleted)))
    assert "total_steps" not in found.config["trainer"]


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (FILES, "ppo"),
        (GRPO, "grpo"),
        ({**GRPO, "algorithm.filter_groups.enable": True}, "dapo"),
        ({**GRPO, f"{ACTOR}.strategy": "megatron", f"{ACTOR}.megatron.tensor_model_parallel_size": 2}, "grpo"),
        ({**GRPO, "trainer.n_gpus_per_node": 8, "trainer.nnodes": 2}, "grpo"),
        ({**GRPO, "actor_rollout_ref.model.lora_rank": 32, "actor_rollout_ref.model.lora_alpha": 64}, "grpo"),
        ({**GRPO, f"{ROLLOUT}.name": "sglang"}, "grpo"),
        ({**GRPO, f"{ROLLOUT}.name": "hf"}, "grpo"),
    ],
)
def test_defaults_of_verl_make_a_valid_configuration(keys: dict[str, Any], name: str) -> None:
    found = translated(keys)
    assert found.recipe == name
    known = {**found.config, "trainer": {**found.config["trainer"], "trackers": ["jsonl"]}}
    config: Any = validate_config(RECIPES[name], known)
    assert config.data.train_batch_size == 1024
    assert config.mini_batch_size == 256
    assert config.trainer.total_epochs == 30
    assert config.actor.optim.weight_decay == 0.01
    assert config.actor.objective.kl_loss.coeff == 0
    assert config.algorithm.overlong is None
    assert config.algorithm.kl_in_reward is None


def test_supervised_fine_tuning_reads_fields_of_columns() -> None:
    keys = {
        "data.train_files": "train.parquet", "data.val_files": "test.parquet",
        "data.prompt_key": "extra_info", "data.prompt_dict_keys": ["question"],
        "data.response_key": "extra_info", "data.response_dict_keys": ["answer"],
        "data.micro_batch_size_per_gpu": 4, "model.partial_pretrain": "/m", "optim.lr": 1e-4,
        "trainer.total_epochs": 2, "trainer.n_gpus_per_node": 1,
    }  # fmt: skip
    found = translated(keys, SFT_ENTRY)
    known = {**found.config, "trainer": {**found.config["trainer"], "trackers": ["jsonl"]}}
    config: Any = validate_config(SFTConfig, known)
    assert (config.data.prompt_key, config.data.response_key) == ("extra_info.question", "extra_info.answer")
    assert config.actor.max_tokens_per_micro_batch == 4 * 1024
    assert config.actor.optim.lr == 1e-4
    optim = config.actor.optim  # defaults of the former trainer
    assert (optim.betas, optim.schedule, optim.warmup_ratio) == ((0.9, 0.95), "cosine", 0.1)
    assert config.data.apply_chat_template == "always"
    assert config.trainer.total_epochs == 2


def test_the_later_trainer_of_supervised_fine_tuning_reads_conversations() -> None:
    keys = {"data.train_files": "t.parquet", "model.path": "/m", "trainer.logger": "console", "optim.lr": 2e-5}
    found = translated(keys, "verl.trainer.sft_trainer")
    config: Any = validate_config(SFTConfig, found.config)
    assert config.data.messages_key == "messages"
    assert config.data.val_files == []
    assert (config.actor.optim.lr, config.actor.optim.schedule) == (2e-5, "constant")
    assert config.actor.max_tokens_per_micro_batch == 8192
    assert config.controller.kind == "local"


def test_other_commands_of_verl_name_ours() -> None:
    with pytest.raises(ConfigError, match="rlcore generate"):
        translated({"data.path": "x"}, "verl.trainer.main_generation")


# --- conversions -----------------------------------------------------------------------------------------------------


def test_mini_batches_count_prompts_in_both() -> None:
    found = translated({**GRPO, "data.train_batch_size": 64, f"{ACTOR}.ppo_mini_batch_size": 16})
    assert value(found, "data.train_batch_size") == 64
    assert value(found, "actor.mini_batch_size") == 16


def test_micro_batches_become_token_budgets() -> None:
    sizes = {"data.max_prompt_length": 512, "data.max_response_length": 1024}
    found = translated({**GRPO, **sizes, f"{ACTOR}.ppo_micro_batch_size_per_gpu": 20})
    assert value(found, "actor.max_tokens_per_micro_batch") == 20 * 1536
    # the former key counts over all GPUs: 64 of 8 GPUs are 8 each
    found = translated({**GRPO, **sizes, f"{ACTOR}.ppo_micro_batch_size": 64, "trainer.n_gpus_per_node": 8})
    assert value(found, "actor.max_tokens_per_micro_batch") == 8 * 1536


def test_dynamic_batch_size_takes_the_tokens_and_not_the_sequences() -> None:
    keys = {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4}
    found = translated({**GRPO, **keys, f"{ACTOR}.ppo_max_token_len_per_gpu": 24000})
    assert value(found, "actor.max_tokens_per_micro_batch") == 24000
    assert "use_dynamic_bsz=True" in reason(found, f"{ACTOR}.ppo_micro_batch_size_per_gpu")
    # the reference follows the actor's switch
    found = translated({**GRPO, **keys, f"{REF}.log_prob_max_token_len_per_gpu": 30000})
    assert value(found, "ref.max_tokens_per_micro_batch") == 30000


def test_adapters_of_megatron() -> None:
    model = "actor_rollout_ref.model.lora"
    keys = {
        f"{ACTOR}.strategy": "megatron",
        f"{model}.rank": 8,
        f"{model}.target_modules": ["linear_qkv", "linear_fc2"],
    }
    found = translated({**GRPO, **keys, f"{model}.dropout": 0.1, f"{ACTOR}.use_kl_loss": True})
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    assert value(found, "actor.megatron.lora") == {"rank": 8, "alpha": 32, "target_modules": targets}
    assert value(found, "rollout.vllm.enable_lora") is True
    assert "no dropout" in reason(found, f"{model}.dropout")
    known = {**found.config, "trainer": {**found.config["trainer"], "trackers": ["jsonl"]}}
    assert "ref" not in validate_config(RECIPES["grpo"], known).roles
    assert "verl reads lora.rank" in reason(
        translated({**GRPO, **keys, "actor_rollout_ref.model.lora_rank": 4}), "actor_rollout_ref.model.lora_rank"
    )


def test_with_adapters_keys_of_the_reference_set_nothing() -> None:
    """In both frameworks the actor without its adapters is the reference then."""
    keys = {"actor_rollout_ref.model.lora_rank": 8, f"{ACTOR}.use_kl_loss": True}
    offload = {f"{REF}.fsdp_config.param_offload": True, f"{REF}.log_prob_micro_batch_size_per_gpu": 4}
    found = translated({**GRPO, **keys, **offload})
    assert "ref" not in found.config
    for key in offload:
        assert "without its adapters" in reason(found, key)
    known = {**found.config, "trainer": {**found.config["trainer"], "trackers": ["jsonl"]}}
    assert "ref" not in validate_config(RECIPES["grpo"], known).roles
    assert value(translated({**GRPO, **offload}), "ref.offload") is True


def test_eighty_does_not_divide_1024() -> None:
    found = translated({**GRPO, "data.train_batch_size": 1024, f"{ACTOR}.ppo_mini_batch_size": 80})
    [note] = [note for note in found.notes if "ppo_mini_batch_size=80" in note]
    assert "the remaining 64 prompts" in note
    assert "64 and 128" in note
    assert nearest_divisors(1024, 80) == [64, 128]
    assert nearest_divisors(7, 9) == [7]


def test_kl_loss_needs_its_switch() -> None:
    off = translated({**GRPO, f"{ACTOR}.kl_loss_coef": 0.01})
    assert value(off, "actor.objective.kl_loss") == {"coeff": 0.0}
    assert reason(off, f"{ACTOR}.kl_loss_coef").startswith(NOTHING_TO_SET)
    on = translated(
        {**GRPO, f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_coef": 0.01, f"{ACTOR}.kl_loss_type": "mse"}
    )
    assert value(on, "actor.objective.kl_loss") == {"coeff": 0.01, "estimator": "k2"}
    default = translated({**GRPO, f"{ACTOR}.use_kl_loss": True})
    assert value(default, "actor.objective.kl_loss") == {"coeff": 0.001, "estimator": "k3"}


def test_kl_in_the_reward_needs_its_switch() -> None:
    off = translated({**FILES, "algorithm.kl_ctrl.kl_coef": 0.01})
    assert value(off, "algorithm.kl_in_reward") is None
    on = translated({**FILES, "algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.kl_coef": 0.01})
    assert value(on, "algorithm.kl_in_reward") == {"coeff": 0.01, "estimator": "k1"}
    adaptive = translated(
        {
            **FILES,
            "algorithm.use_kl_in_reward": True,
            "algorithm.kl_ctrl.type": "adaptive",
            "algorithm.kl_penalty": "abs",
        }
    )
    assert value(adaptive, "algorithm.kl_in_reward") == {
        "coeff": 0.001, "estimator": "abs", "target": 0.1, "horizon": 10000,
    }  # fmt: skip


def test_clip_ratio_alone_is_hidden_by_the_defaults_of_its_sides() -> None:
    found = translated({**GRPO, f"{ACTOR}.clip_ratio": 0.3})
    assert value(found, "actor.objective.policy_loss.clip_high") == 0.2
    assert "clip_ratio_low=0.2" in reason(found, f"{ACTOR}.clip_ratio")
    found = translated({**GRPO, f"{ACTOR}.clip_ratio": 0.3, f"{ACTOR}.clip_ratio_high": None})
    assert value(found, "actor.objective.policy_loss") == {
        "name": "ppo", "clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0,
    }  # fmt: skip


def test_gspo_has_its_own_aggregation_whatever_loss_agg_mode_says() -> None:
    keys = {f"{ACTOR}.policy_loss.loss_mode": "gspo", f"{ACTOR}.clip_ratio_low": 3e-4, f"{ACTOR}.clip_ratio_high": 4e-4}
    found = translated({**GRPO, **keys, f"{ACTOR}.loss_agg_mode": "token-mean"})
    assert value(found, "actor.objective.policy_loss") == {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}
    assert value(found, "actor.objective.aggregation") == {"name": "seq-mean-token-mean"}


def test_a_loss_that_rlcore_lacks_is_reported() -> None:
    found = translated({**GRPO, f"{ACTOR}.policy_loss.loss_mode": "clip_cov"})
    assert "the policy losses are" in reason(found, f"{ACTOR}.policy_loss.loss_mode")


@pytest.mark.parametrize(
    ("freq", "ours"), [(-1, -1), (0, -1), (5, 5)]
)  # fmt: skip
def test_intervals_below_one_are_never(freq: int, ours: int) -> None:
    found = translated({**GRPO, "trainer.save_freq": freq, "trainer.test_freq": freq})
    assert value(found, "trainer.save_freq") == ours
    assert value(found, "trainer.test_freq") == ours


@pytest.mark.parametrize(
    ("filters", "truncation", "ours"), [(True, "left", "filter"), (False, "error", "error"), (False, "left", "left")]
)
def test_filtered_prompts_leave_nothing_to_truncate(filters: bool, truncation: str, ours: str) -> None:
    found = translated({**GRPO, "data.filter_overlong_prompts": filters, "data.truncation": truncation})
    assert value(found, "data.overlong_prompts") == ours


def test_schedules_count_optimizer_steps() -> None:
    """64 prompts in mini-batches of 16, two epochs: 8 optimizer steps a step."""
    keys: dict[str, Any] = {
        "data.train_batch_size": 64,
        f"{ACTOR}.ppo_mini_batch_size": 16,
        f"{ACTOR}.ppo_epochs": 2,
    }
    found = translated({**GRPO, **keys, f"{ACTOR}.optim.lr_warmup_steps": 10})
    assert value(found, "actor.optim.warmup_steps") == 80
    keys |= {f"{ACTOR}.optim.lr_warmup_steps_ratio": 0.05}
    assert value(translated({**GRPO, **keys}), "actor.optim.warmup_ratio") == 0.05
    found = translated({**GRPO, **keys, f"{ACTOR}.optim.lr_warmup_steps": 0})
    assert value(found, "actor.optim.warmup_steps") == 0
    assert "lr_warmup_steps decides" in reason(found, f"{ACTOR}.optim.lr_warmup_steps_ratio")


def test_checkpoints_and_resume() -> None:
    found = translated({**GRPO, "trainer.save_freq": 20, "trainer.resume_mode": "disable"})
    assert value(found, "trainer.keep_checkpoints") is None  # verl keeps all
    assert value(found, "trainer.resume") == "never"
    keys = {
        "trainer.resume_mode": "resume_path",
        "trainer.resume_from_path": "/old",
        "trainer.max_actor_ckpt_to_keep": 3,
    }
    found = translated({**GRPO, **keys, "trainer.default_local_dir": "/out"})
    assert value(found, "trainer.resume") == "/old"
    assert value(found, "trainer.keep_checkpoints") == 3
    assert value(found, "trainer.out_dir") == "/out"


def test_the_folder_of_a_run_follows_from_its_names() -> None:
    found = translated({**GRPO, "trainer.project_name": "p", "trainer.experiment_name": "e"})
    assert value(found, "trainer.out_dir") == "checkpoints/p/e"


def test_gpus_become_processes() -> None:
    assert translated({**GRPO, "trainer.n_gpus_per_node": 1}).config["controller"] == {"kind": "local"}
    found = translated({**GRPO, "trainer.n_gpus_per_node": 8, "trainer.nnodes": 2})
    pools = {"default": {"processes": 16, "gpus_per_process": 1}}
    assert found.config["controller"] == {"kind": "ray", "pools": pools, "address": "auto"}


def test_the_asynchronous_trainer_gets_two_pools_and_a_bound_on_staleness() -> None:
    keys = {
        "trainer.n_gpus_per_node": 4, "rollout.nnodes": 1, "rollout.n_gpus_per_node": 4,
        f"{ROLLOUT}.tensor_model_parallel_size": 2, f"{ACTOR}.ppo_mini_batch_size": 32, "data.train_batch_size": 0,
        "async_training.require_batches": 4, "async_training.trigger_parameter_sync_step": 2,
        "async_training.staleness_threshold": 0.5, "rollout.total_rollout_steps": 25600,
    }  # fmt: skip
    found = translated({**GRPO, **keys}, "verl.experimental.fully_async_policy.fully_async_main")
    config: Any = validate_config(
        GRPOConfig, {**found.config, "trainer": {**found.config["trainer"], "trackers": ["jsonl"]}}
    )
    assert config.mini_batch_size == 128
    assert config.data.train_batch_size == 256
    assert config.trainer.total_steps == 100
    assert config.asynchronous.max_staleness == 1
    pools = config.controller.pools
    assert (pools["train"].processes, pools["generate"].processes, pools["generate"].gpus_per_process) == (4, 2, 2)
    assert config.rollout.options.tensor_parallel_size == 2
    assert config.rollout.options.mode == "process"


def test_corrections() -> None:
    section = "algorithm.rollout_correction"
    found = translated({**GRPO, f"{section}.rollout_is": "token", f"{section}.rollout_is_threshold": 3})
    assert value(found, "actor.objective.correction") == {"name": "tis", "cap": 3.0, "level": "token"}
    keys = {f"{section}.rollout_rs": "seq_mean_k1", f"{section}.rollout_rs_threshold": "0.999_1.001"}
    found = translated({**GRPO, **keys, f"{section}.bypass_mode": True})
    assert value(found, "actor.objective.correction") == {
        "name": "mis", "level": "geometric", "low": 0.999, "high": 1.001, "weight": "one",
    }  # fmt: skip
    assert value(found, "actor.old_logprobs") == "rollout"


def test_corrections_of_earlier_versions() -> None:
    found = translated({**GRPO, f"{ACTOR}.tis_imp_ratio_cap": 2})
    assert value(found, "actor.objective.correction") == {"name": "tis", "cap": 2.0, "level": "token"}
    found = translated({**GRPO, "algorithm.rollout_is_level": "sequence", "algorithm.rollout_is_threshold": 4})
    assert value(found, "actor.objective.correction") == {"name": "tis", "cap": 4.0, "level": "sequence"}


def test_rewards() -> None:
    assert translated(GRPO).config["reward"] == {"name": "data_source"}
    keys = {"custom_reward_function.path": "r.py", "custom_reward_function.reward_kwargs.scale": 2}
    found = translated({**GRPO, **keys})
    assert found.config["reward"] == {"path": "r.py:compute_score", "function": {"kwargs": {"scale": 2}}}
    overlong = {"enable": True, "len": 128, "penalty_factor": 0.5, "log": False}
    for section in ("reward_model.reward_kwargs.overlong_buffer_cfg", "reward_model.overlong_buffer"):
        found = translated({**GRPO, **{f"{section}.{name}": item for name, item in overlong.items()}})
        assert value(found, "algorithm.overlong") == {"buffer": 128, "factor": 0.5}


def test_trackers() -> None:
    found = translated({**GRPO, "trainer.logger": ["console", "swanlab", "clearml"]})
    assert value(found, "trainer.trackers") == ["console", "swanlab", "jsonl"]
    assert any("clearml" in note for note in found.notes)
    assert value(translated({**GRPO, "trainer.logger": "console"}), "trainer.trackers") == ["console", "jsonl"]


def test_text_generation_inference_is_a_server() -> None:
    found = translated({**GRPO, f"{ROLLOUT}.name": "tgi"})
    assert value(found, "rollout.engine") == "http"
    assert value(found, "rollout.http") == {"protocol": "tgi"}
    assert any("rollout.http" in note for note in found.notes)


def test_references_to_other_keys_are_followed() -> None:
    found = translated({**GRPO, "trainer.experiment_name": "e7", "trainer.project_name": "${trainer.experiment_name}"})
    assert value(found, "trainer.project") == "e7"


def test_a_number_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="ppo_mini_batch_size: 'many' is not a number"):
        translated({**GRPO, f"{ACTOR}.ppo_mini_batch_size": "many"})
