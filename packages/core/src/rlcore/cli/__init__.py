"""The ``rlcore`` command."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends the process."""
    from rlcore.cli.command_tree import cli

    cli.main(arguments, prog_name="rlcore")


def run_recipe_module(name: str) -> None:
    """``python -m <recipe's module> …``, the same as ``rlcore run <name> …``; ends the process."""
    main(["run", name, *sys.argv[1:]])
