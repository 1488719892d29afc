"""``rlcore completions``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completions(ctx: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    \b
    bash    eval "$(rlcore completions bash)"              in ~/.bashrc
    zsh     eval "$(rlcore completions zsh)"               in ~/.zshrc
    fish    rlcore completions fish > ~/.config/fish/completions/rlcore.fish
    """
    complete = get_completion_class(shell)
    assert complete is not None  # click knows all three
    click.echo(complete(ctx.find_root().command, {}, "rlcore", "_RLCORE_COMPLETE").source())
