"""``rlcore data``: prepare data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import click

from rlcore.cli.folder import Folder
from rlcore.config import Config
from rlcore.errors import DataError, PluginError
from rlcore_recipes.data.prepare.convert import convert
from rlcore_recipes.data.prepare.rows import Splits
from rlcore_recipes.data.prepare.tokenize import tokenize
from rlcore_recipes.data.user_functions import function_in

GROUP = "rlcore.data_sets"

Preparation = Callable[[Any], Splits]


_OTHER = {"convert": convert, "tokenize": tokenize}


class DataSets(click.Group):
    """One command per installed data set, `convert`, `tokenize`, and any function as ``path/to/file.py:function``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*_installed(), *_OTHER])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _OTHER:
            return _OTHER[name]
        if name in _installed():
            return _command(name, _load(_installed()[name]))
        path, _, function = name.rpartition(":")
        return _command(name, function_in(Path(path), function)) if path.endswith(".py") else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the data sets of all installed packages."""
        rows = []
        for name, point in sorted(_installed().items()):
            try:
                rows.append((name, _summary(_load(point))))
            except PluginError as error:
                rows.append((name, f"not usable: {error}"))
        with formatter.section("Data sets"):
            formatter.write_dl(rows)
        with formatter.section("Other data"):
            formatter.write_dl([(name, command.get_short_help_str(limit=100)) for name, command in _OTHER.items()])


@click.group(cls=DataSets, subcommand_metavar="DATA_SET [OPTIONS]")
def data() -> None:
    """Prepare data sets: Parquet files with chat messages, ground truth and data source.

    DATA_SET is one of those below, or your own function as path/to/file.py:function.
    """


def _command(name: str, prepare: Preparation) -> click.Command:
    """Return the command of a data set: an option for every field of its options, and where to write.

    An option of a field that is a mapping takes ``key=value``, and may be repeated.
    """
    options = next(iter(get_type_hints(prepare).values()), None)
    if not (isinstance(options, type) and issubclass(options, Config)):
        raise DataError(f"{name}: the function's argument must be annotated with its options, an rlcore.config.Config")

    mappings = [name for name, info in options.model_fields.items() if get_origin(info.annotation) in (dict, Mapping)]

    def run(out: Path, overwrite: bool, **given: Any) -> None:
        from rlcore.config import load_config
        from rlcore_recipes.data.prepare.writing import write_splits

        words = [f"{field}={value}" for field, value in given.items() if value is not None and field not in mappings]
        words += [f"{field}.{word}" for field in mappings for word in given[field]]
        chosen = load_config(options, overrides=words)
        for path, rows in write_splits(prepare(chosen), out, overwrite).items():
            click.echo(f"{path}: {rows:,} rows")

    params: list[click.Parameter] = []
    for field, info in options.model_fields.items():
        default = {"required": True} if info.is_required() else {"default": info.default, "show_default": True}
        flag = f"--{field.replace('_', '-')}"
        if field in mappings:
            default = {"multiple": True, "metavar": "KEY=VALUE"}
        # text: the options' model reads it, and reports all problems together
        params.append(click.Option([flag, field], type=str, help=info.description, **default))
    params += [
        click.Option(["--out"], type=Folder(), required=True, help="Folder to write to."),
        click.Option(["--overwrite"], is_flag=True, help="Replace files that are there."),
    ]
    return click.Command(name, params=params, callback=run, help=prepare.__doc__)


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint) -> Preparation:
    try:
        return point.load()  # type: ignore[no-any-return]
    except Exception as error:
        raise PluginError(f"data set {point.name!r} ({point.value}) cannot be imported: {error!r}") from error


def _summary(prepare: Preparation) -> str:
    return (prepare.__doc__ or "").strip().split("\n")[0]
