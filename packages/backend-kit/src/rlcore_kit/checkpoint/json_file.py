"""The JSON files of checkpoints: each is described by a `JsonFile`, and read and written through it alone.

What does not fit the description is a damaged checkpoint, whatever it is: not JSON, another shape, a number out of its
range, a pipe in place of the file.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rlcore.errors import CheckpointError
from rlcore.regular_file import read_regular

LIMIT = 1 << 30  # bytes; the largest file, of a thousand ranks with a thousand weights each, has a third of that
_SHOWN = 200  # characters of a key or reason in a message


class JsonFile(BaseModel):
    """Base class of the descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def encoded(self, indent: int | None = None) -> bytes:
        """Return what `read` and `parse` take."""
        return self.model_dump_json(indent=indent).encode()


M = TypeVar("M", bound=BaseModel)


def read(file: Path, kind: type[M]) -> M:
    """Read a JSON file.

    Raises:
        CheckpointError: see `read_bytes` and `parse`.
    """
    return parse(read_bytes(file), kind, str(file))


def read_bytes(file: Path) -> bytes:
    """Read the contents of a JSON file for `parse`.

    Raises:
        CheckpointError: it is missing, is not a regular file, or is too large.
    """
    try:
        return read_regular(file, LIMIT)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def parse(content: bytes | str, kind: type[M], where: str) -> M:
    """Read JSON that was in the file ``where``.

    Raises:
        CheckpointError: it does not hold a ``kind``; the message names the first entry that does not fit.
    """
    try:
        return kind.model_validate_json(content, strict=True)
    except ValidationError as error:
        problems = {problem["loc"]: problem for problem in error.errors(include_url=False)}
        # another engine or format explains whatever else does not fit
        for key, says in (
            ("engine", "was written by the engine {}, not {}; continue with that one, or start in another folder"),
            ("format", "has format {}, this rlcore reads {}"),
        ):
            if (problem := problems.get((key,))) is not None and problem["type"] == "literal_error":
                found = says.format(_short(problem["input"]), problem["ctx"]["expected"])
                raise CheckpointError(f"{where} {found}") from None
        raise CheckpointError(f"{where} is damaged: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """Return the first entry that does not fit, and why."""
    first = error.errors(include_url=False)[0]
    entry = _short(".".join(str(part) for part in first["loc"]))
    return f"{entry}{': ' if entry else ''}{_short(first['msg'])}"


def _inside(name: str) -> str:
    """Check that ``name`` is the path of a file in a folder, as `PurePosixPath` prints it."""
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
        raise ValueError("names a file outside the checkpoint")
    return name


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


FileName = Annotated[str, Field(max_length=4096), AfterValidator(_inside)]
"""The path of a file in the checkpoint's folder, never of one outside it."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
