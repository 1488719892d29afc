"""The type of command-line options that name a folder."""

from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from rlcore.config import FilePath

_ADAPTER: TypeAdapter[Path] = TypeAdapter(FilePath)


class Folder(click.ParamType):
    """A folder on this machine, there or not, under the rules of configuration keys: no URL, ``~`` is expanded."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            path = _ADAPTER.validate_python(value)
        except ValidationError as error:
            self.fail(f"{value}: {error.errors()[0]['msg']}", param, ctx)
        if path.exists() and not path.is_dir():
            self.fail(f"{value} is a file; name a folder", param, ctx)
        return path
