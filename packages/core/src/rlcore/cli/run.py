"""``rlcore run``."""

from __future__ import annotations

import sys

import click

from rlcore import plugins
from rlcore.cli import recipes
from rlcore.cli.console import out
from rlcore.cli.key_help import KeyHelp
from rlcore.config import Config
from rlcore.plugins import Plugin


class _Recipe(recipes.ConfiguredCommand):
    """One recipe. ``--help`` takes a topic: a section of its configuration, or a word in the names of keys."""

    def __init__(self, name: str) -> None:
        self._plugin = plugins.get(recipes.GROUP, name)
        super().__init__(
            name,
            callback=self._run,
            params=recipes.configuration_parameters(),
            help=f"{self._plugin.summary}\n\nText and paths are taken as they are, all other values are YAML: "
            "a.b=1e-6, a.b=[1, 2], a.b=null.",
        )

    def _run(self, file: str | None, overrides: tuple[str, ...]) -> None:
        start(self._plugin, recipes.load_complete(self._plugin, file, overrides))

    def get_help_option(self, ctx: click.Context) -> click.Option:
        return click.Option(
            ["-h", "--help"],
            is_flag=False,
            flag_value="",
            default=None,
            is_eager=True,
            expose_value=False,
            metavar="[TOPIC]",
            callback=self._show_help,
            help="Show this, or the keys of a section, those with a word in their name, or all.",
        )

    def _show_help(self, ctx: click.Context, option: click.Parameter, topic: str | None) -> None:
        if topic is None or ctx.resilient_parsing:
            return
        with out.capture() as keys:
            KeyHelp(out, self._plugin.config_class(), f"{ctx.command_path} --help").print(topic)
        text = "\n".join(line.rstrip() for line in keys.get().splitlines())
        if not topic:
            ready_made = [f"  --config {name}" for name in self._plugin.ready_made()]
            listed = ["", "Ready-made configurations:", *ready_made] if ready_made else []
            text = "\n".join([self.get_help(ctx), *listed, text])
        text = text.strip("\n")
        if sys.stdout.isatty() and text.count("\n") >= out.height:
            click.echo_via_pager(text, color=True)
        else:
            click.echo(text)
        ctx.exit()


def start(plugin: Plugin, config: Config) -> None:
    """Run the recipe ``plugin`` in this process."""
    recipes.find_own_modules()
    plugin.build(config)


class _Recipes(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return plugins.names(recipes.GROUP)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        return _Recipe(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        with formatter.section("Recipes"):
            if names:
                formatter.write_dl([(name, recipes.summary(name)) for name in names])
            else:
                formatter.write_text("none is installed; run: pip install 'rlcore[fsdp]'")


@click.group(cls=_Recipes, invoke_without_command=True, subcommand_metavar="RECIPE [--config FILE] [KEY=VALUE]...")
@click.pass_context
def run(ctx: click.Context) -> None:
    """Run a recipe. `rlcore run RECIPE --help` shows its required keys and the sections of its configuration."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
