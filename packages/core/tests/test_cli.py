import json
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner, Result

import rlcore
from rlcore.cli.command_tree import cli

RECIPE = """
import os, signal, sys, time, warnings
from pydantic import Field
from rlcore.config import Config
from rlcore.errors import DataError, RlcoreWarning
from rlcore.plugins import Plugin

class Optim(Config):
    lr: float = Field(1e-6, gt=0, description="Learning rate.")

class Nothing(Config):
    "Nothing to set."

class Settings(Config):
    '''What to try.'''
    outcome: str = Field("good", description="How it ends.")
    optim: Optim = Optim()
    nothing: Nothing = Nothing()

def run(config):
    if config.outcome == "data":
        raise DataError("train.parquet: no column 'prompt'")
    if config.outcome == "bug":
        raise ZeroDivisionError("a bug")
    if config.outcome == "warning":
        warnings.warn("skipped [a]", RlcoreWarning, stacklevel=1)
    if config.outcome == "import":
        import my_own_module
    if config.outcome == "pipe":
        raise BrokenPipeError("a worker went away")
    if config.outcome == "interrupted":
        print("ready", flush=True)
        time.sleep(60)
    print(f"ran with {config.optim.lr}")

attempt = Plugin(
    interface=1,
    config="acme_recipe:Settings",
    factory="acme_recipe:run",
    summary="Try something.",
    configs="acme_configs",
)
"""
COMMAND = """
import click

@click.command()
@click.argument("what")
def polish(what):
    "Polish something."
    click.echo(f"polished {what}")
"""


@pytest.fixture(autouse=True)
def site(distribution):
    points = {
        "rlcore.recipes": {"attempt": "acme_recipe:attempt", "broken": "acme_gone:x"},
        "rlcore.commands": {"polish": "acme_command:polish", "dull": "acme_gone:x"},
        "rlcore.trackers": {"acme": "acme_gone:x"},
    }
    site = distribution("acme-things", points, {"acme_recipe": RECIPE, "acme_command": COMMAND})
    (site / "acme_configs").mkdir()
    (site / "acme_configs" / "base.yaml").write_text("optim: {lr: 0.125}\n")
    (site / "acme_configs" / "big.yaml").write_text("defaults: base.yaml\n")
    return site


def rlcore_command(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="rlcore")


def process(site, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "rlcore", *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs these tests in the background has SIGINT ignored, which is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_version():
    assert rlcore_command("--version").output == f"rlcore {rlcore.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_commands_without_importing_them(arguments):
    result = rlcore_command(*arguments)
    assert result.exit_code == 0
    for name in ("run", "config", "plugins", "completions", "polish", "dull"):
        assert f"\n  {name} " in result.output
    assert "From acme-things 1.5." in result.output
    assert "acme_command" not in sys.modules


def test_run_alone_lists_recipes():
    result = rlcore_command("run")
    assert result.exit_code == 0
    assert re.search(r"attempt +Try something\.", result.output)
    assert "broken" in result.output
    assert "cannot be used" in result.output


def test_run_help_is_an_overview():
    result = rlcore_command("run", "attempt", "--help")
    assert result.exit_code == 0
    assert "Usage: rlcore run attempt [OPTIONS] [KEY=VALUE]..." in result.output
    for text in (
        "Try something.",
        "--config FILE",
        "Ready-made configurations:\n  --config base\n",
        "optim      1 key",
        "nothing  no keys",
    ):
        assert text in result.output, text
    assert "optim.lr" not in result.output


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize(
    ("topic", "found", "not_found"),
    [
        ("optim", ["optim.lr=1.0e-06", "float > 0  Learning rate."], ["outcome"]),
        ("optim.lr=3", ["optim.lr=1.0e-06"], ["outcome"]),
        ("OUTC", ["outcome=good", "text  How it ends."], ["optim"]),
        ("all", ["outcome=good", "optim.lr=1.0e-06"], []),
    ],
)
def test_run_help_on_a_topic(monkeypatch, width, topic, found, not_found):
    monkeypatch.setattr("rlcore.cli.console.out.width", width)
    for arguments in (["--help", topic], ["-h", topic]):
        result = rlcore_command("run", "attempt", *arguments)
        assert result.exit_code == 0, (result.exception, result.output)
        for text in found:
            assert text in result.output, text
        for text in not_found:
            assert text not in result.output, text
        assert max(map(len, result.output.splitlines())) <= width


def test_run_help_on_nothing_suggests_a_topic():
    result = rlcore_command("run", "attempt", "--help", "optimm")
    assert result.exit_code == 1
    assert "no section is called 'optimm', and no key has it in its name; did you mean optim?" in result.stderr


def test_run_with_file_and_overrides(tmp_path):
    (tmp_path / "run.yaml").write_text("optim: {lr: 0.5}\n")
    assert rlcore_command("run", "attempt").output == "ran with 1e-06\n"
    assert rlcore_command("run", "attempt", "--config", str(tmp_path / "run.yaml")).output == "ran with 0.5\n"
    assert rlcore_command("run", "attempt", "optim.lr=2", "-c", str(tmp_path / "run.yaml")).output == "ran with 2.0\n"


def test_a_recipe_finds_modules_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", os.getcwd())])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_own_module.py").write_text("")
    monkeypatch.chdir(tmp_path / "mine")
    result = rlcore_command("run", "attempt", "outcome=import")
    assert (result.exit_code, result.output) == (0, "ran with 1e-06\n")
    assert sys.path[-1] == os.getcwd(), "behind what is installed"
    del sys.modules["my_own_module"]


def test_run_with_a_ready_made_configuration():
    assert rlcore_command("run", "attempt", "--config", "big").output == "ran with 0.125\n"
    assert (
        "Ready-made configurations:\n  --config base\n  --config big\n" in rlcore_command("run", "attempt", "-h").output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "attempt", "-c", "bgi"],
            "bgi: neither a file nor a ready-made configuration of this recipe (base, big); did you mean big?",
        ),
        (["run", "attempt", "outcome=data"], "error: train.parquet: no column 'prompt'\n"),
        (["run", "attempt", "optim.lrr=2"], "optim.lrr: unknown key; did you mean optim.lr?"),
        (["run", "attempt", "-c", "gone.yaml"], "error: gone.yaml: no such configuration file\n"),
        (["run", "atempt"], "error: unknown recipe 'atempt'; did you mean 'attempt'?\n"),
        (["run", "broken"], "recipe 'broken' (acme-things 1.5) cannot be imported: ModuleNotFoundError"),
        (["config", "show", "atempt"], "error: unknown recipe 'atempt'; did you mean 'attempt'?\n"),
        (["config", "validate", "attempt", "optim.lr=0"], "optim.lr: must be greater than 0, not 0"),
        (["dull"], "command 'dull' (acme-things 1.5) cannot be imported: ModuleNotFoundError"),
    ],
)
def test_errors_in_the_input_are_one_message_on_standard_error(arguments, message):
    result = rlcore_command(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback():
    result = rlcore_command("--debug", "run", "attempt", "outcome=data")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "DataError: train.parquet" in result.stderr


def test_debug_by_environment(monkeypatch):
    monkeypatch.setenv("RLCORE_DEBUG", "1")
    assert "Traceback" in rlcore_command("run", "attempt", "outcome=data").stderr


def test_messages_are_printed_as_they_are():
    result = rlcore_command("run", "attempt", "--config", "[bold]:smile:.yaml")
    assert result.stderr == "error: [bold]:smile:.yaml: no such configuration file\n"


def test_other_exceptions_are_bugs_and_keep_their_traceback():
    result = rlcore_command("run", "attempt", "outcome=bug")
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_broken_pipe_in_a_recipe_is_not_silent():
    result = rlcore_command("run", "attempt", "outcome=pipe")
    assert result.exit_code == 1
    assert "a worker went away" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "no such command 'rnu'; did you mean run?"),
        (["quikstart"], "no such command 'quikstart'; did you mean quickstart?"),
        (["--what"], "No such option"),
        (["run", "attempt", "--what"], "No such option"),
        (["run", "attempt", "--optim.lr=3"], "keys are written without dashes: optim.lr=3"),
        (["config", "validate", "attempt", "--optim.lr", "3"], "keys are written without dashes: optim.lr=3"),
        (["config", "show", "attempt", "-c", "base", "--outcome=bad"], "without dashes: outcome=bad"),
        (["run", "attempt", "-lr=3"], "no such option -lr; keys are written without dashes: lr=3"),
        (["run", "attempt", "-optim.lr", "3"], "keys are written without dashes: optim.lr=3"),
        (["run", "attempt", "-x"], "No such option '-x'"),
        (["config", "show", "attempt", "--confg", "base"], "Did you mean '--config'?"),
        (["config", "show"], "Missing argument 'RECIPE'"),
        (["completions", "tcsh"], "Invalid value"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message):
    result = rlcore_command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_command_of_ours_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("rlcore.plugins._points", lambda group: {})
    result = rlcore_command("quickstart")
    assert result.exit_code == 1
    assert result.stderr == "error: command 'quickstart' is not installed; run: pip install 'rlcore[fsdp]'\n"


def test_run_without_any_recipe_says_what_to_install(monkeypatch):
    monkeypatch.setattr("rlcore.plugins._points", lambda group: {})
    assert "pip install 'rlcore[fsdp]'" in rlcore_command("run").output


def test_command_of_another_package():
    assert rlcore_command("polish", "shoes").output == "polished shoes\n"


def test_config_show_validates_and_fills_in_defaults():
    shown = yaml.safe_load(rlcore_command("config", "show", "attempt", "optim.lr=0.5").output)
    assert shown == {"outcome": "good", "optim": {"lr": 0.5}, "nothing": {}}


def test_config_validate():
    assert rlcore_command("config", "validate", "attempt").output == "valid\n"


def test_packages_that_are_missing_stop_run_and_validate_and_not_show(monkeypatch):
    monkeypatch.setattr("rlcore.cli.recipes.missing_packages", lambda config: [("optim", "needs the package x")])
    for arguments in (["run", "attempt"], ["config", "validate", "attempt"]):
        result = rlcore_command(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "1 package cannot be found:\n  optim: needs the package x\n" in result.stderr
    assert rlcore_command("config", "show", "attempt").exit_code == 0


def test_config_schema():
    schema = json.loads(rlcore_command("config", "schema", "attempt").output)
    assert schema["properties"]["outcome"]["description"] == "How it ends."


def test_plugins_table_and_exit_code(monkeypatch):
    groups = {"rlcore.recipes": ("recipe", 1), "rlcore.trackers": ("tracker", 1)}
    monkeypatch.setattr("rlcore.plugins.GROUPS", groups)  # not the engines installed here
    result = rlcore_command("plugins")
    assert result.exit_code == 0
    rows = {tuple(line.split()[:2]): line for line in result.output.splitlines()}
    assert "acme-things 1.5" in rows["recipes", "attempt"]
    assert " ok " in rows["recipes", "attempt"]
    assert "Try something." in rows["recipes", "attempt"]
    assert " broken " in rows["trackers", "acme"]
    assert " ok " in rows["commands", "polish"]
    assert " broken " in rows["commands", "dull"]
    assert rlcore_command("plugins", "--check").exit_code == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    result = rlcore_command("completions", shell)
    assert result.exit_code == 0
    assert f"_RLCORE_COMPLETE={shell}_complete" in result.output


def test_completion_offers_commands_and_recipes(site):
    def complete(words: str, index: int) -> str:
        environment = {"PYTHONPATH": str(site), "COMP_WORDS": words, "COMP_CWORD": str(index)}
        return subprocess.run(
            [sys.executable, "-m", "rlcore"],
            env={**os.environ, **environment, "_RLCORE_COMPLETE": "bash_complete"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    assert "plain,polish" in complete("rlcore pol", 1)
    assert "plain,attempt" in complete("rlcore run att", 2)
    assert "plain,attempt" in complete("rlcore config show att", 3)


def test_interrupt_exits_with_130_quietly(site):
    running = process(site, "run", "attempt", "outcome=interrupted")
    try:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    finally:
        running.kill()
    assert (running.returncode, out, err) == (130, "", "")


def test_process_exit_codes(site):
    for outcome, code in (("good", 0), ("data", 1), ("bug", 1)):
        running = process(site, "run", "attempt", f"outcome={outcome}")
        _, err = running.communicate(timeout=60)
        assert running.returncode == code
        assert ("Traceback" in err) == (outcome == "bug")


def test_our_warnings_are_one_line(site):
    assert process(site, "run", "attempt", "outcome=warning").communicate(timeout=60)[1] == "warning: skipped [a]\n"


def test_module_of_a_recipe_is_the_same_command(site):
    (site / "acme_module.py").write_text("from rlcore.cli import run_recipe_module\nrun_recipe_module('attempt')\n")
    done = subprocess.run(
        [sys.executable, "-m", "acme_module", "optim.lr=3"],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "ran with 3.0\n"
