"""What a user gives: a script, a configuration file, or the words of a command."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.arguments import read_launch
from rlcore_recipes.from_verl.assignment import VerlCommand
from rlcore_recipes.from_verl.config_file import read_config_file
from rlcore_recipes.from_verl.launch import find_launch
from rlcore_recipes.from_verl.shell.script import read_script
from rlcore_recipes.from_verl.word import Word

YAML = (".yaml", ".yml")


def read_source(source: Path | None, words: Sequence[str], environment: Mapping[str, str]) -> VerlCommand:
    """Read verl's command.

    Args:
        source: a shell script, or a YAML file of verl; None: ``words`` are the command.
        words: the command, or the arguments of the script.
        environment: variables that are set.

    Raises:
        ConfigError: there is no command of verl in it, or a part of it is wrong or not known.
    """
    if source is None:
        return read_words(words, environment)
    if source.suffix not in YAML:
        script = read_script(source, environment, words)
        return read_launch(script.launch, script.variables, script.folder)
    if words:
        raise ConfigError(f"{source} is a YAML file, which takes no arguments: {' '.join(words)[:80]}")
    return read_config_file(source, environment)


def read_words(words: Sequence[str], environment: Mapping[str, str]) -> VerlCommand:
    """Read the words of a command line, as the shell has passed them.

    Raises:
        ConfigError: they do not start verl, or one of them is no override.
    """
    launch = find_launch([Word(text, f"argument {number}") for number, text in enumerate(words, start=1)])
    if launch is None:
        raise ConfigError(
            f"{' '.join(words)[:80]}: is no command of verl, such as python3 -m verl.trainer.main_ppo key=value …"
        )
    return read_launch(launch, environment, os.getcwd())
