"""``rlcore from-verl``."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path, PurePosixPath

import click

from rlcore import plugins
from rlcore.cli import recipes
from rlcore.cli.run import start
from rlcore.config import Config, validate_config
from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.assignment import Translation, VerlCommand
from rlcore_recipes.from_verl.output import as_yaml, report, summary
from rlcore_recipes.from_verl.source import read_source
from rlcore_recipes.from_verl.translate import translate

_PROGRAMS = re.compile(r"python[\d.]*|torchrun|ray|srun|nohup|env|accelerate")


class _FromVerl(click.Command):
    """Takes what follows ``--`` as it is: the words of verl's command may look like options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and _PROGRAMS.fullmatch(PurePosixPath(args[0]).name):
            args = ["--", *args]
        cut = args.index("--") if "--" in args else len(args)
        ctx.obj = tuple(args[cut + 1 :])
        try:
            return super().parse_args(ctx, args[:cut])
        except click.UsageError as error:
            if cut == len(args) and any("=" in word and not word.startswith("-") for word in args):
                hint = "arguments of the script, and verl's keys, stand after --"
                raise click.UsageError(f"{error.format_message()}; {hint}", ctx) from None
            raise


@click.command(cls=_FromVerl)
@click.argument("source", type=click.Path(path_type=Path), required=False, metavar="[SCRIPT.sh | CONFIG.yaml]")
@click.option(
    "--env", "variables", multiple=True, metavar="NAME=VALUE", help="A variable of the script; can be repeated."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the YAML there.")
@click.option("--run", "runs", is_flag=True, help="Run it, as `rlcore run` would.")
@click.option("--check", is_flag=True, help="Print only what is not translated; exit with 1 if a key is not known.")
@click.pass_context
def from_verl(
    ctx: click.Context, source: Path | None, variables: tuple[str, ...], out: Path | None, runs: bool, check: bool
) -> None:
    """Translate a command, a shell script or a YAML file of verl into the configuration of a recipe.

    \b
    rlcore from-verl -- python3 -m verl.trainer.main_ppo data.train_files=…
    rlcore from-verl run_qwen.sh --env MODEL_PATH=models/qwen > my.yaml
    rlcore from-verl run_qwen.sh -- trainer.total_epochs=1
    rlcore from-verl config.yaml --run

    Prints YAML for `rlcore run --config`, with a comment for each key of verl; keys without an equivalent are named
    with the reason. Nothing in a script is run. What follows -- is verl's command, or the arguments of the script.
    """
    words: tuple[str, ...] = ctx.obj
    if source is None and not words:
        raise click.UsageError("give a script, a YAML file, or -- and verl's command", ctx)
    if check and runs:
        raise click.UsageError("--check runs nothing; leave --run out", ctx)
    command = read_source(source, words, {**os.environ, **_environment(variables)})
    translation = _translated(command)
    prints = not (check or runs or out)
    if prints:
        click.echo(as_yaml(translation, _words(command, source)), nl=False)
    if not (prints and sys.stdout.isatty()):  # the YAML ends with it
        click.echo("\n".join(report(translation)), err=True)
    click.echo(f"\n{summary(command, translation)}", err=True)
    if out is not None:
        _write(out, as_yaml(translation, _words(command, source)))
    config = _validated(command, translation)
    if check:
        ctx.exit(any(not item.understood for item in translation.untranslated))
    if runs:
        recipes.check_packages(config)
        start(plugins.get(recipes.GROUP, translation.recipe), config)


def _environment(variables: tuple[str, ...]) -> dict[str, str]:
    pairs = [variable.partition("=") for variable in variables]
    for name, equals, _ in pairs:
        if not (equals and re.fullmatch(r"[A-Za-z_]\w*", name)):
            raise ConfigError(f"--env {name}: write NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _translated(command: VerlCommand) -> Translation:
    """Translate ``command``; an error names the place of the key that it begins with.

    Raises:
        ConfigError: the command trains nothing, or a value is none that verl takes.
    """
    try:
        return translate(command)
    except ConfigError as error:
        places = {assignment.key: assignment.place for assignment in command.assignments}
        place = places.get(str(error).partition(":")[0])
        raise ConfigError(f"{place}: {error}" if place else str(error)) from None


def _validated(command: VerlCommand, translation: Translation) -> Config:
    """Validate the configuration; each problem names the key of verl and its place.

    Raises:
        ConfigError: the configuration is not valid.
    """
    model = plugins.get(recipes.GROUP, translation.recipe).config_class()
    return validate_config(model, translation.config, f"translated from {command.entry}", _places(command, translation))


def _places(command: VerlCommand, translation: Translation) -> dict[tuple[str | int, ...], str]:
    """Return where verl's keys were given for each key of the configuration."""
    latest = {assignment.key: assignment for assignment in command.assignments}
    places: dict[tuple[str | int, ...], str] = {}
    for dotted, comment in translation.comments.items():
        named = [latest[key] for key in re.findall(r"[\w.]+\w", comment) if key in latest]
        if named:
            places[tuple(dotted.split("."))] = ", ".join(f"{item.place}: {item.key}" for item in named)
    return places


def _words(command: VerlCommand, source: Path | None) -> str:
    return f"{command.entry} in {shlex.quote(str(source))}" if source is not None else f"a command of {command.entry}"


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
