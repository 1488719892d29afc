"""Two commands of verl's users run from ``rlcore from-verl --run``, with a tiny model and small sizes substituted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from rlcore.cli.command_tree import cli

PPO = """python3 -m verl.trainer.main_ppo data.train_files=$HOME/data/gsm8k/train.parquet
data.val_files=$HOME/data/gsm8k/test.parquet data.train_batch_size=256 data.val_batch_size=1312
data.max_prompt_length=512 data.max_response_length=256 actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct
actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.ppo_mini_batch_size=64
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8
actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.gpu_memory_utilization=0.4
actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4 critic.optim.lr=1e-5
critic.model.path=Qwen/Qwen2.5-0.5B-Instruct critic.ppo_micro_batch_size_per_gpu=4 algorithm.kl_ctrl.kl_coef=0.001
trainer.logger=['console','swanlab'] trainer.val_before_train=False trainer.default_hdfs_dir=null
trainer.n_gpus_per_node=1 trainer.nnodes=1 trainer.save_freq=10 trainer.test_freq=10 trainer.total_epochs=15
trainer.log_val_generations=1"""
GRPO = """python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo data.train_files=$HOME/data/gsm8k/train.parquet
data.val_files=$HOME/data/gsm8k/test.parquet data.train_batch_size=1024 data.max_prompt_length=512
data.max_response_length=1024 data.filter_overlong_prompts=True data.truncation='error'
actor_rollout_ref.model.path=Qwen/Qwen3-1.7B actor_rollout_ref.actor.optim.lr=1e-6
actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.ppo_mini_batch_size=80
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=20 actor_rollout_ref.actor.use_kl_loss=True
actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.actor.kl_loss_type=low_var_kl
actor_rollout_ref.actor.entropy_coeff=0 actor_rollout_ref.model.enable_gradient_checkpointing=True
actor_rollout_ref.actor.fsdp_config.param_offload=False actor_rollout_ref.actor.fsdp_config.optimizer_offload=False
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=20
actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.name=vllm
actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.rollout.n=3
actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=20 actor_rollout_ref.ref.fsdp_config.param_offload=True
algorithm.use_kl_in_reward=False trainer.critic_warmup=0 trainer.logger=['console']
trainer.project_name='verl_grpo_example_gsm8k' trainer.experiment_name='qwen3_1_7b_function_rm'
trainer.n_gpus_per_node=1 trainer.nnodes=1 trainer.save_freq=-1 trainer.test_freq=5 trainer.total_epochs=15"""
SMALL = (
    *("data.max_prompt_length=32", "data.max_response_length=8", "data.train_batch_size=8", "data.val_batch_size=4"),
    *("actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.name=hf", "trainer.total_epochs=1"),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with GSM8K in verl's layout, in which the run is started."""
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    for split, count in (("train", 16), ("test", 4)):
        rows = [
            {
                "data_source": "openai/gsm8k",
                "prompt": [{"role": "user", "content": f"What is {number} + 1?"}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
                "extra_info": {"split": split, "index": number},
            }
            for number in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SWANLAB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "account"))
    return tmp_path


def run(command: str, home: Path, *changes: str, options: tuple[str, ...] = ("--run",)) -> Any:
    """The command as a script, over several lines, with ``changes`` as its arguments."""
    script = home / "run.sh"
    script.write_text("set -x\n" + command.replace("\n", " \\\n  ") + ' "$@"\n')
    arguments = ["from-verl", str(script), "--env", f"HOME={home}", *options, "--", *changes]
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def test_ppo_trains_with_swanlab(task: Any, home: Path, metrics_of: Callable[[Path], list[dict[str, float]]]) -> None:
    models = (f"actor_rollout_ref.model.path={task.model}", f"critic.model.path={task.model}")
    result = run(PPO, home, *SMALL, *models)
    assert result.exit_code == 0, result.output
    out = home / "checkpoints" / "verl_examples" / "gsm8k"
    lines = metrics_of(out)
    assert len([line for line in lines if "critic/vf_loss" in line]) == 2  # 16 prompts, 8 in a step
    assert any("val-core/openai/gsm8k/reward/mean@1" in line for line in lines)
    assert list(out.glob("swanlog/run-*/*.swanlab"))
    assert {"critic/vf_loss", "critic/score/mean", "actor/pg_loss", "actor/entropy"} <= set(lines[0])
    assert not any("actor/kl_loss" in line for line in lines)
    assert not any("val-core/openai/gsm8k/reward/mean@1" in line for line in lines[:-1])  # not before training
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["data"]["train_batch_size"], config["actor"]["mini_batch_size"], config["rollout"]["n"]) == (8, 4, 1)
    assert config["actor"]["max_tokens_per_micro_batch"] == 4 * (32 + 8)
    assert config["algorithm"]["advantage"]["name"] == "gae"
    assert config["algorithm"]["kl_in_reward"] is None  # verl's default, which makes kl_ctrl.kl_coef idle
    assert config["actor"]["optim"]["weight_decay"] == config["critic"]["optim"]["weight_decay"] == 0.01
    assert (out / "checkpoints" / "step-000002").is_dir()


def test_grpo_trains_where_its_mini_batch_divides_the_batch(
    task: Any, home: Path, metrics_of: Callable[[Path], list[dict[str, float]]]
) -> None:
    model = f"actor_rollout_ref.model.path={task.model}"
    refused = run(GRPO, home, model)
    assert refused.exit_code == 1
    assert "nearest size that divides it is 64 or 128" in refused.output
    assert "run.sh:6: actor_rollout_ref.actor.ppo_mini_batch_size" in refused.output

    result = run(GRPO, home, *SMALL, model)
    assert result.exit_code == 0, result.output
    out = home / "checkpoints" / "verl_grpo_example_gsm8k" / "qwen3_1_7b_function_rm"
    assert len([line for line in metrics_of(out) if "actor/kl_loss" in line]) == 2
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["rollout"]["n"] == 3
    assert config["data"]["overlong_prompts"] == "filter"
    assert not (out / "checkpoints").exists()  # save_freq=-1
    assert metrics_of(out)[0]["step"] == 0  # verl validates before training by default
    assert config["actor"]["objective"]["kl_loss"] == {"coeff": 0.001, "estimator": {"name": "k3"}}


def test_servers_are_translated_without_being_there(home: Path) -> None:
    for name, engine in (("sglang", "sglang"), ("vllm", "vllm")):
        result = run(PPO, home, f"actor_rollout_ref.rollout.name={name}", options=("--check",))
        assert result.exit_code == 0, result.output
        text = run(PPO, home, f"actor_rollout_ref.rollout.name={name}", options=()).stdout
        assert yaml.safe_load(text)["rollout"]["engine"] == engine
    rollout = yaml.safe_load(run(PPO, home, "actor_rollout_ref.rollout.name=sglang", options=()).stdout)["rollout"]
    assert rollout["sglang"] == {"tp_size": 1, "mem_fraction_static": 0.4}


def test_text_generation_inference_needs_its_url(home: Path) -> None:
    result = run(PPO, home, "actor_rollout_ref.rollout.name=tgi", options=())
    assert result.exit_code == 1
    assert "rollout.http.urls: is required" in result.output
    assert yaml.safe_load(result.stdout)["rollout"]["http"] == {"protocol": "tgi"}
