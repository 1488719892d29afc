"""The command tree, and how errors leave it."""

from __future__ import annotations

import traceback
import warnings
from difflib import get_close_matches
from typing import Any

import click

import rlcore
from rlcore import plugins
from rlcore.cli.console import err
from rlcore.errors import RlcoreError, RlcoreWarning, WorkerDied, WorkerError

# name -> (module:attribute, help); help stands here so that listing commands imports none of them
_OWN = {
    "run": ("rlcore.cli.run:run", "Run a recipe, or list recipes."),
    "config": ("rlcore.cli.config:config", "Show, check or describe the configuration of a recipe."),
    "plugins": ("rlcore.cli.plugins:list_plugins", "List installed plugins, and why one cannot be used."),
    "completions": ("rlcore.cli.completions:completions", "Print a shell's completion script."),
}
# commands that rlcore's other packages bring
_OURS = {
    "plan": "Print what a run would start, and where, before it does.",
    "quickstart": "Train a small model from scratch on this machine.",
    "data": "Prepare data sets.",
    "from-verl": "Translate a command, a script or a configuration file of verl.",
    "model": "Make and convert models.",
    "eval": "Measure and compare models and checkpoints.",
    "generate": "Complete prompts with a model or checkpoint.",
    "chat": "Talk to a model or checkpoint.",
    "gate": "Train tiny tasks, and test whether a change hurts learning.",
    "export": "Write a checkpoint as a Hugging Face model folder.",
}


_with_place = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format warnings of rlcore without the line of code, which does not help the user."""
    if issubclass(category, RlcoreWarning):
        return f"warning: {message}\n"
    return _with_place(message, category, filename, lineno, line)


class CommandTree(click.Group):
    """Finds commands when they are called, and turns exceptions into exit codes.

    1 is an `RlcoreError`, whose message goes to standard error, or a `WorkerError`, whose message holds the worker's
    own traceback; 2 wrong usage; 130 an interrupt. Any other exception is a bug and keeps its traceback.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_OWN, *(name for name in plugins.names(plugins.COMMANDS) if name not in _OWN)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _OWN:
            return plugins.resolve(_OWN[cmd_name][0])  # type: ignore[no-any-return]
        if cmd_name in plugins.names(plugins.COMMANDS) or plugins.is_ours(plugins.COMMANDS, cmd_name):
            return plugins.load(plugins.COMMANDS, cmd_name, "command")  # type: ignore[no-any-return]
        if ctx.resilient_parsing:
            return None
        close = get_close_matches(cmd_name, {*self.list_commands(ctx), *_OURS}, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise click.UsageError(f"no such command {cmd_name!r}{hint}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        rows = []
        for name in self.list_commands(ctx):
            own = _OWN[name][1] if name in _OWN else _OURS.get(name)
            rows.append((name, own or f"From {plugins.origin(plugins.COMMANDS, name)}."))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        warnings.formatwarning = _format_warning
        try:
            return super().invoke(ctx)
        except (RlcoreError, WorkerError) as error:
            if isinstance(error, WorkerError) and error.__cause__ is not None and not isinstance(error, WorkerDied):
                raise  # it failed in this very process, and the cause has the traceback
            if ctx.params["debug"]:
                traceback.print_exception(error)
            else:
                err.print("[bold red]error:[/] ", end="")
                err.print(str(error), markup=False, soft_wrap=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            ctx.exit(130)
        except BrokenPipeError:  # click would end quietly, and hide a worker process that went away
            traceback.print_exc()
            ctx.exit(1)


@click.group(cls=CommandTree, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rlcore.__version__, prog_name="rlcore", message="%(prog)s %(version)s")
@click.option(
    "--debug",
    is_flag=True,
    envvar="RLCORE_DEBUG",
    show_envvar=True,
    help="Show the traceback of errors in the input and in workers too.",
)
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Reinforcement-learning post-training of large language models.

    \b
    rlcore run                                list recipes
    rlcore run grpo --help                    required keys and sections of a recipe
    rlcore run grpo --help actor.optim        the keys of a section, their defaults and meaning
    rlcore run grpo --config my.yaml actor.optim.lr=1e-6
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
