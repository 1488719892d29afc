"""The type of command-line options that name a folder."""

from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from rlcore.config import FilePath

_ADAPTER: TypeAdapter[Path] = TypeAdapter(FilePath)


class Folder(click.Path):
    """A folder on this machine, there or not, under the rules of configuration keys: no URL, ``~`` is expanded."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            path = _ADAPTER.validate_python(value)
        except ValidationError as error:
            self.fail(f"{value}: {error.errors()[0]['msg']}", param, ctx)
        return super().convert(path, param, ctx)
