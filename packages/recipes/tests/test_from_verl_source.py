"""What a user gives to ``rlcore from-verl``: the words of a command, Hydra's options, and YAML files of verl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.assignment import VerlCommand
from rlcore_recipes.from_verl.source import read_source

PPO = ("python3", "-m", "verl.trainer.main_ppo")


def read(*words: str, environment: Mapping[str, str] = {}) -> VerlCommand:
    return read_source(None, words, environment)


def values(command: VerlCommand) -> dict[str, Any]:
    return {item.prefix + item.key: item.value for item in command.assignments}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_words_of_a_command_are_assignments_with_their_places() -> None:
    command = read(*PPO, "data.x=1e-6", "+a.b={c:1,d:{e:[f]}}", "~g.h", "++i.j=null")
    assert command.entry == "verl.trainer.main_ppo"
    assert values(command) == {"data.x": 1e-6, "+a.b.c": 1, "+a.b.d.e": ["f"], "~g.h": None, "++i.j": None}
    assert [item.place for item in command.assignments] == [
        "argument 4",
        *["argument 5"] * 2,
        "argument 6",
        "argument 7",
    ]


@pytest.mark.parametrize(
    ("words", "entry"),
    [
        (
            ["torchrun", "--nproc_per_node=8", "-m", "verl.trainer.fsdp_sft_trainer", "optim.lr=1"],
            "verl.trainer.fsdp_sft_trainer",
        ),
        (["ray", "job", "submit", "--", "python", "-m", "recipe.dapo.main_dapo", "data.x=1"], "recipe.dapo.main_dapo"),
        (["python3.11", "-u", "/opt/verl/verl/trainer/main_ppo.py", "data.x=1"], "verl.trainer.main_ppo"),
        (["python", "my_dapo.py", "actor_rollout_ref.x=1"], "my_dapo"),
        (["srun", "-N1", "python3", "-m", "mine.train", "trainer.nnodes=1"], "mine.train"),
    ],
)
def test_the_entry_is_found_behind_what_starts_it(words: list[str], entry: str) -> None:
    assert read(*words).entry == entry


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls", "-m", "x"], "ls -m x: is no command of verl, such as python3 -m verl.trainer.main_ppo"),
        ([*PPO, "data.x"], "argument 4: 'data.x' is no Hydra override"),
        ([*PPO, "--multirun", "a=1"], "argument 4: --multirun starts several runs"),
        ([*PPO, "--cfg", "job"], "argument 4: --cfg only shows something of verl; leave it out"),
        ([*PPO, "--frob"], "argument 4: --frob is no option of Hydra that is read here"),
        ([*PPO, "--config-name"], "argument 4: a value is missing after --config-name"),
        (
            [*PPO, "--config-name=mine"],
            "the configuration mine is none of verl's, .* --config-path=/absolute",
        ),
        (
            [*PPO, "a=1,2", "b=(", "c=3"],
            r"2 arguments of verl's command cannot be read:\n  .* 4: .*\n  .* 5: ",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_its_number(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(*words)


def test_a_configuration_of_verl_is_its_defaults_and_names_its_engine() -> None:
    assert values(read(*PPO, "--config-path=config", "--config-name=ppo_trainer.yaml", "data.x=1")) == {"data.x": 1}
    given = values(read(*PPO, "--config-name", "ppo_megatron_trainer", "data.x=1"))
    assert given == {"model_engine": "megatron", "data.x": 1}


def test_a_configuration_of_the_user_lies_below_the_command(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "defaults: [ppo_trainer, _self_]\ndata:\n  x: 1\n  y: ${data.x}\n")
    command = read(*PPO, f"--config-path={tmp_path}", "--config-name=mine", "data.x=2")
    assert [(item.key, item.value, item.place) for item in command.assignments] == [
        ("data.x", 1, f"{file}:3"),
        ("data.y", 2, f"{file}:4"),
        ("data.x", 2, "argument 6"),
    ]


def test_a_yaml_file_is_read_with_the_files_below_it(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "trainer: {nnodes: 1, project_name: base}\n")
    write(tmp_path / "sampling" / "wide.yaml", "n: 16\n")
    file = write(
        tmp_path / "mine.yaml",
        """hydra: {searchpath: [file://verl/trainer/config]}
defaults:
  - ppo_trainer
  - model_engine: megatron
  - actor@actor_rollout_ref.actor: dp_actor
  - base
  - sampling@actor_rollout_ref.rollout: wide
  - _self_
actor_rollout_ref:
  actor:
    _target_: verl.workers.config.ActorConfig
    optim: {lr: 1e-6}
    ppo_mini_batch_size: ${oc.select:data.batch,64}
  model: {override_config: {}, path: "${oc.env:MODEL}"}
trainer: {logger: [console, wandb], project_name: mine}
""",
    )
    command = read_source(file, (), {"MODEL": "qwen"})
    assert command.entry == "verl.trainer.main_ppo"
    assert values(command) == {
        "model_engine": "megatron",
        "trainer.nnodes": 1,
        "trainer.project_name": "mine",
        "actor_rollout_ref.rollout.n": 16,
        "actor_rollout_ref.actor.optim.lr": 1e-6,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
        "actor_rollout_ref.model.override_config": {},
        "actor_rollout_ref.model.path": "qwen",
        "trainer.logger": ["console", "wandb"],
    }


def test_the_overrides_that_hydra_writes_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / ".hydra" / "overrides.yaml", "- data.x=1\n- +trainer.logger=['console']\n")
    assert values(read_source(file, (), {})) == {"data.x": 1, "+trainer.logger": ["console"]}


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("model: {partial_pretrain: x}\n", "verl.trainer.fsdp_sft_trainer"),
        ("data: {max_length: 3}\nmodel: {path: x}\n", "verl.trainer.sft_trainer"),
        ("algorithm: {filter_groups: {enable: true}}\n", "recipe.dapo.main_dapo"),
        ("data: {train_batch_size: 3}\n", "verl.trainer.main_ppo"),
    ],
)
def test_the_keys_of_a_yaml_file_say_which_trainer_reads_it(text: str, entry: str, tmp_path: Path) -> None:
    assert read_source(write(tmp_path / "a.yaml", text), (), {}).entry == entry


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.yaml:1: must be a mapping of verl's keys, or a list of overrides"),
        ("{}", "mine.yaml: sets no key of verl"),
        ("a: [", "mine.yaml:1:5: not valid YAML"),
        ("a: {b: 1, b: 2}", "mine.yaml:1:11: not valid YAML: key 'b' stands here twice"),
        ("defaults: [nope]\n", "mine.yaml:1: 'defaults' names .*nope.yaml, which does not exist"),
        ("defaults: [mine]\n", "include each other"),
        ("defaults: [[x]]\n", "an entry of 'defaults' is a name or one group with its choice"),
        ("a: ${b}\n", r"mine.yaml:1: a: \$\{b\} refers to b, which is not given"),
        ("- a\n", "mine.yaml:1: 'a' is no Hydra override"),
    ],
)
def test_what_is_wrong_with_a_yaml_file_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_source(write(tmp_path / "mine.yaml", text), (), {})


def test_a_script_starts_verl_in_its_folder_with_its_variables(tmp_path: Path) -> None:
    write(tmp_path / "config" / "mine.yaml", "data: {path: '${oc.env:DATA}/x'}\n")
    script = write(
        tmp_path / "run.sh",
        f'cd {tmp_path}\nexport DATA=/data\n{" ".join(PPO)} --config-dir=config --config-name=mine "$@"\n',
    )
    assert values(read_source(script, ("data.n=2",), {})) == {"data.path": "/data/x", "data.n": 2}


def test_a_reference_in_a_value_begins_where_the_value_stands(tmp_path: Path) -> None:
    """``${.a}`` at ``x.b`` is ``x.a``, also for a key elsewhere that refers to ``x.b``; ``???`` is no value."""
    text = "x:\n  a: 7\n  b: ${.a}\n  c: ???\ny:\n  n: ${x.b}\n  m: ${oc.select:x.b,1}\n"
    file = write(tmp_path / "mine.yaml", text)
    assert values(read_source(file, (), {})) == {"x.a": 7, "x.b": 7, "y.n": 7, "y.m": 7}
