"""``rlcore from-verl`` as a user meets it: YAML that a recipe takes, what is not translated, and mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlcore import plugins
from rlcore.cli import recipes
from rlcore.cli.command_tree import cli
from rlcore_recipes.from_verl.assignment import Assignment, Translation, Untranslated
from rlcore_recipes.from_verl.output import MOST_IN_FULL, WIDTH, as_yaml, report

SCRIPT = """set -x
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}

python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=$DATA/train.parquet \\
    data.val_files=$DATA/test.parquet \\
    data.train_batch_size=256 \\
    data.max_prompt_length=512 \\
    data.max_response_length=256 \\
    actor_rollout_ref.model.path=$MODEL \\
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \\
    actor_rollout_ref.rollout.name=hf \\
    actor_rollout_ref.rollout.n=5 \\
    trainer.n_gpus_per_node=1 \\
    trainer.logger=['console'] "$@" 2>&1 | tee log.txt
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.sh").write_text(SCRIPT)
    return Path("run.sh")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["from-verl", *arguments], catch_exceptions=False)


def test_a_script_becomes_yaml_that_the_recipe_takes(script: Path) -> None:
    result = run("run.sh", "--env", "DATA=/data")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# Recipe grpo, translated from verl.trainer.main_ppo in run.sh.")
    assert "  train_batch_size: 256  # data.train_batch_size\n" in result.stdout
    Path("my.yaml").write_text(result.stdout)
    config = recipes.load(plugins.get(recipes.GROUP, "grpo"), "my.yaml", ()).model_dump()
    assert config["model"]["path"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert [str(path) for path in config["data"]["train_files"]] == ["/data/train.parquet"]
    assert (config["actor"]["mini_batch_size"], config["rollout"]["n"]) == (64, 5)


def test_out_writes_the_file_and_check_only_the_report(script: Path) -> None:
    assert run("run.sh", "--env", "DATA=/data", "--out", "my.yaml").stdout == ""
    assert Path("my.yaml").read_text() == run("run.sh", "--env", "DATA=/data").stdout
    result = run("run.sh", "--env", "DATA=/data", "--check")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "keys of verl.trainer.main_ppo for the recipe grpo: " in result.stderr


def test_check_fails_for_a_key_that_is_not_known(script: Path) -> None:
    result = run("run.sh", "--env", "DATA=/data", "--check", "--", "trainer.frobnicate=3", "trainer.balance_batch=True")
    assert result.exit_code == 1
    assert "Keys that are not known:\n- trainer.frobnicate=3  (argument 1 of run.sh)" in result.stderr
    assert ", 1 not known" in result.stderr.splitlines()[-1]


def test_a_wrong_value_names_verls_key_and_its_line(script: Path) -> None:
    result = run("run.sh", "--env", "DATA=/data", "--", "trainer.total_epochs=-3")
    assert result.exit_code == 1
    line = next(line for line in result.stderr.splitlines() if "total_epochs: must" in line)
    assert line.endswith("(argument 1 of run.sh: trainer.total_epochs)")
    script.write_text(SCRIPT.replace("rollout.n=5", "rollout.n=0"))
    assert "  (run.sh:14: actor_rollout_ref.rollout.n)" in run("run.sh", "--env", "DATA=/data").stderr


def test_every_variable_that_is_missing_is_named_with_its_line(script: Path) -> None:
    result = run("run.sh")
    assert result.exit_code == 1
    assert "run.sh:6: DATA is not set; give --env DATA=VALUE\n  run.sh:7: DATA is not set" in result.stderr


def test_a_command_may_stand_after_dashes_or_alone() -> None:
    words = SCRIPT.partition("python3")[2].replace("\\\n", " ").replace("$DATA", "/data").replace("$MODEL", "m")
    command = ["python3", *words.partition(' "$@"')[0].split()]
    assert run("--", *command).exit_code == 0
    assert run(*command).stdout == run("--", *command).stdout


@pytest.mark.parametrize("value", ["many", "inf", "nan", "1.5", "[1]", "null"])
def test_a_value_that_is_no_whole_number_names_the_key_and_its_line(script: Path, value: str) -> None:
    for key, line in (("data.train_batch_size", 8), ("trainer.n_gpus_per_node", 15)):
        script.write_text(re.sub(rf"{key}=\S+", f"{key}={value}", SCRIPT))
        result = run("run.sh", "--env", "DATA=/data")
        assert result.exit_code == 1
        assert f"run.sh:{line}: {key}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give a script, a YAML file, or -- and verl's command"),
        (["run.sh", "--check", "--run"], 2, "--check runs nothing; leave --run out"),
        (["no.sh"], 1, "no.sh: no such script"),
        (["rum.sh"], 1, "rum.sh: no such script; did you mean run.sh"),
        (["no.yaml"], 1, "no.yaml: no such file"),
        (["run.sh", "--env", "DATA"], 1, "--env DATA: write NAME=VALUE"),
        (["run.sh", "trainer.nnodes=1"], 2, "arguments of the script, and verl's keys, stand after --"),
        (["run.sh", "--env", "DATA=/d", "--out", "no/such/file"], 1, "--out no/such/file: cannot be written"),
        (
            ["run.sh", "--", "--run"],
            1,
            "argument 1 of run.sh: options of rlcore from-verl, such as --run, stand",
        ),
        (["--", "ls", "-l"], 1, "ls -l: is no command of verl, such as python3 -m verl.trainer.main_ppo"),
    ],
)
def test_a_mistake_is_one_sentence(script: Path, arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_comments_and_report_fit_into_eighty_columns() -> None:
    key = "actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity"
    items = tuple(
        Untranslated(Assignment(name, value, prefix, "run.sh:3"), reason, understood)
        for name, value, prefix, reason, understood in (
            ("a.b", "x", "+", "because " * 20, True),
            ("c.d", [1, 2], "", "because " * 20, True),
            ("e.f", None, "~", "is not known", False),
        )
    )
    comments = {"actor.optim.lr": key, "actor.name": "a.b", "actor.long": "x.y, " * 30}
    config = {"actor": {"optim": {"lr": 1e-6}, "long": "a # b", "name": "x"}, "empty": {}}
    text = as_yaml(Translation("grpo", config, comments, items, ("a note " * 30,)), "a command")
    assert all(len(line) <= WIDTH or len(line.split()) == 2 for line in text.splitlines())
    assert "  # a.b\n" in text
    assert "long: 'a # b'\n" in text
    lines = report(Translation("grpo", config, comments, items, ()))
    assert lines[1:4] == ["Keys that are not known:", "- ~e.f  (run.sh:3)", "    is not known"]
    assert lines[5:8] == ["Keys without an equivalent:", "- +a.b=x  (run.sh:3)", "- c.d=[1, 2]  (run.sh:3)"]


def test_of_very_many_keys_the_names_alone_are_listed() -> None:
    items = tuple(
        Untranslated(Assignment(f"section.key_{number}", number, "", "a.yaml:1"), "there is none", True)
        for number in range(MOST_IN_FULL + 1)
    )
    lines = report(Translation("grpo", {}, {}, items, ()))
    assert len(lines) < 30
    assert lines[2].startswith("- section.key_0, section.key_1, ")
    assert all(len(line) <= WIDTH for line in lines)
