"""The arguments of verl's command: overrides, and the options of Hydra that name configuration files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.assignment import Assignment, VerlCommand
from rlcore_recipes.from_verl.config_file import OWN_CONFIGS, assignments_of_file, own_config
from rlcore_recipes.from_verl.hydra import parse_override
from rlcore_recipes.from_verl.interpolation import resolved
from rlcore_recipes.from_verl.launch import Launch
from rlcore_recipes.from_verl.word import Unknown, Word

_FILE_OPTIONS = {
    "--config-path": "path",
    "-cp": "path",
    "--config-name": "name",
    "-cn": "name",
    "--config-dir": "dir",
    "-cd": "dir",
}
_NO_TRAINING = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--cfg",
    "-c",
    "--resolve",
    "--info",
    "-i",
    "--shell-completion",
)


def read_launch(launch: Launch, environment: Mapping[str, str], folder: str | None) -> VerlCommand:
    """Return what the command ``launch`` says.

    Args:
        environment: for ``${oc.env:NAME}``.
        folder: in which it starts, for relative paths of configuration files; None if it is not known.

    Raises:
        ConfigError: an argument is not known or no override, or a configuration file cannot be read.
    """
    entry = _text(launch.entry)
    options: dict[str, Word] = {}
    overrides: list[Assignment] = []
    problems: list[str] = []
    words = iter(launch.arguments)
    for word in words:
        try:
            text = _text(word)
            if text.startswith("-"):
                name, value = _option(text, word, words)
                options[name] = value
            else:
                overrides.append(parse_override(text, word.place))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        title = f"{len(problems)} arguments of verl's command cannot be read:"
        raise ConfigError(problems[0] if len(problems) == 1 else "\n  ".join([title, *dict.fromkeys(problems)]))
    below = _configured(entry, options, environment, folder)
    return VerlCommand(entry, resolved([*below, *overrides], environment))


def _text(word: Word) -> str:
    try:
        return word.known()
    except Unknown as reason:
        raise ConfigError(str(reason)) from None


def _option(text: str, word: Word, words: Iterator[Word]) -> tuple[str, Word]:
    name, equals, value = text.partition("=")
    if name in ("--multirun", "-m"):
        raise ConfigError(f"{word.place}: {name} starts several runs; rlcore translates one")
    if name in _NO_TRAINING:
        raise ConfigError(f"{word.place}: {name} only shows something of verl; leave it out")
    if name not in _FILE_OPTIONS:
        if name in ("--run", "--check", "--out", "--env"):
            raise ConfigError(f"{word.place}: options of rlcore from-verl, such as {name}, stand before --")
        known = ", ".join(_FILE_OPTIONS)
        raise ConfigError(f"{word.place}: {name} is no option of Hydra that is read here ({known})")
    if equals:
        return _FILE_OPTIONS[name], replace(word, text=value)
    following = next(words, None)
    if following is None:
        raise ConfigError(f"{word.place}: a value is missing after {name}")
    return _FILE_OPTIONS[name], following


def _configured(
    entry: str, options: Mapping[str, Word], environment: Mapping[str, str], folder: str | None
) -> list[Assignment]:
    """Return what the configuration file sets that the options of Hydra name."""
    if "name" not in options:
        return []
    name, place = _text(options["name"]).removesuffix(".yaml"), options["name"].place
    for option in ("path", "dir"):
        if option not in options:
            continue
        given = re.sub(r"^file://", "", _text(options[option]))
        # a relative --config-path begins at the folder of the module, --config-dir at the working directory
        start = Path(folder or ".", *(entry.split(".")[:-1] if option == "path" else []))
        file = start / given / f"{name}.yaml"
        if file.is_file() and not (name in OWN_CONFIGS and file.parent.parts[-3:] == ("verl", "trainer", "config")):
            return assignments_of_file(file, environment)
    if own_config(name):
        return [Assignment("model_engine", "megatron", "", place)] if "megatron" in name else []
    raise ConfigError(
        f"{place}: the configuration {name} is none of verl's, and no file {name}.yaml was found; give its folder with "
        "--config-path=/absolute/folder"
    )
