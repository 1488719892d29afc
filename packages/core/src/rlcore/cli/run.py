"""``rlcore run``."""

from __future__ import annotations

import click

from rlcore import plugins
from rlcore.cli import recipes
from rlcore.cli.console import out
from rlcore.cli.key_table import print_keys


class _Recipe(click.Command):
    """One recipe. Its help ends with every key of its configuration."""

    def __init__(self, name: str) -> None:
        self._plugin = plugins.get(recipes.GROUP, name)
        super().__init__(
            name,
            callback=self._run,
            params=recipes.configuration_parameters(),
            help=f"{self._plugin.summary}\n\nValues are YAML: a.b=1e-6, a.b=[1, 2], a.b=null.",
        )

    def _run(self, file: str | None, overrides: tuple[str, ...]) -> None:
        self._plugin.build(recipes.load(self._plugin, file, overrides))

    def get_help(self, ctx: click.Context) -> str:
        with out.capture() as keys:
            print_keys(out, self._plugin.config_class())
        lines = [line.rstrip() for line in keys.get().splitlines()]
        ready_made = [f"  --config {name}" for name in self._plugin.ready_made()]
        if ready_made:
            ready_made = ["", "Ready-made configurations:", *ready_made]
        return "\n".join([super().get_help(ctx), *ready_made, "", "Keys, with default, type and meaning:", *lines])


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
    """Run a recipe. `rlcore run RECIPE --help` lists every key of its configuration."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
