"""The ``rlcore`` command."""


def main() -> None:
    """Entry point of the console script."""
    from rlcore.cli.main import cli

    cli()
