"""``rlcore data convert``: apply a user's function to all rows of a data set, as verl's preparation scripts do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from rlcore.boundary import reason
from rlcore.cli.folder import Folder
from rlcore.errors import DataError
from rlcore_recipes.data.columns import Row
from rlcore_recipes.data.user_functions import function_in

Map = Callable[[Row, int], Row | None]


@click.command("convert", short_help="Any data set, by a function of yours that makes a row of each row.")
@click.option("--source", required=True, help="Folder of data files, one data file, or name on the Hub.")
@click.option("--config", help="Configuration of the data set on the Hub; or which folder of several has the files.")
@click.option(
    "--map",
    "function",
    required=True,
    help="path/to/file.py:function, which is make_map_fn(split) and returns a function of (example, idx), as in verl's "
    "scripts, or a function of (example) or (example, idx). That returns the new row, or None to drop it.",
)
@click.option("--out", type=Folder(), required=True, help="Folder to write <split>.parquet to.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
def convert(source: str, config: str | None, function: str, out: Path, overwrite: bool) -> None:
    """Make a row of each row of a data set, by a function of yours.

    As in datasets.map, the new row has the columns that the function returns, and those of the old row that the
    function has not taken out of it.
    """
    from rlcore_recipes.data.prepare.sources import all_splits
    from rlcore_recipes.data.prepare.writing import write_splits

    path, _, name = function.rpartition(":")
    if not path.endswith(".py") or not name:
        raise DataError(f"--map {function}: name a function as path/to/file.py:function")
    map_of = _by_split(function_in(Path(path), name), function)
    splits, dropped = {}, {}
    for split, rows in all_splits(source, config).items():
        splits[split], dropped[split] = _converted(rows, map_of(split), f"{function} on row {{}} of split {split}")
    for file, count in write_splits(splits, out, overwrite).items():
        lost = dropped[file.stem]
        click.echo(f"{file}: {count:,} rows{f', {lost:,} dropped' if lost else ''}")


def _by_split(function: Callable[..., Any], name: str) -> Callable[[str], Map]:
    """Return what makes the function of a split: the user's, or a constant.

    Raises:
        DataError: the function takes other arguments.
    """
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if parameters and parameters[0].name == "split":
        return lambda split: _map(function(split), f"{name}({split!r})")
    same = _map(function, name)
    return lambda split: same


def _map(function: Any, name: str) -> Map:
    if not callable(function):
        raise DataError(f"{name} returns a {type(function).__name__}, not a function of (example, idx)")
    signature = inspect.signature(function)
    for taken in (2, 1):
        try:
            signature.bind(*[None] * taken)
        except TypeError:
            continue
        return function if taken == 2 else lambda example, index: function(example)
    raise DataError(f"{name}{signature} must take (split), (example, idx) or (example)")


def _converted(rows: Iterable[Row], function: Map, where: str) -> tuple[list[Row], int]:
    """Return the new rows, and how many were dropped.

    Raises:
        DataError: the function fails, or returns something else than a dict or None.
    """
    converted: list[Row] = []
    number = -1
    for number, row in enumerate(rows):
        try:
            made = function(row, number)
        except Exception as error:
            raise DataError(f"{where.format(number)} fails: {reason(error)}") from error
        if made is None:
            continue
        if not isinstance(made, dict):
            raise DataError(f"{where.format(number)} returns a {type(made).__name__}, not a dict or None")
        converted.append({**row, **made})
    return converted, number + 1 - len(converted)
