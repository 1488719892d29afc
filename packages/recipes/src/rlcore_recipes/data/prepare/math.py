r"""MATH (Hendrycks et al., 2021): https://github.com/hendrycks/math."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from rlcore.boundary import boundary
from rlcore.config import Config, FileName
from rlcore.errors import DataError
from rlcore_recipes.data.columns import Row
from rlcore_recipes.data.prepare.rows import Splits, prompt_row
from rlcore_recipes.data.prepare.sources import field, read_split


class MathOptions(Config):
    """Options of ``rlcore data math``."""

    source: FileName = Field(
        "DigitalLearningGmbH/MATH-lighteval",
        description="Folder with train and test (.jsonl or .parquet files, or folders of .json files as published), or "
        "Hub name.",
    )
    instruction: str = Field(
        "Let's think step by step and output the final answer within \\boxed{}.",
        description="Text after every problem; may be empty.",
    )


def math(options: MathOptions) -> Splits:
    r"""Competition mathematics; answers stand in \boxed{}."""
    splits: Splits = {}
    for split in ("train", "test"):
        rows = splits[split] = []
        for number, row in enumerate(_read(options.source, split)):
            problem = field(row, "problem", options.source, number)
            solution = field(row, "solution", options.source, number)
            answer = last_boxed(solution)
            if answer is None:
                raise DataError(f"{options.source}, {split} row {number}: the solution has no \\boxed answer")
            rows.append(
                prompt_row(
                    f"{problem} {options.instruction}".strip(),
                    answer,
                    "hendrycks/math",
                    response=solution,
                    split=split,
                    index=number,
                    level=str(row.get("level", "")),
                    type=str(row.get("type", "")),
                )
            )
    return splits


def last_boxed(solution: str) -> str | None:
    r"""Return what the last ``\boxed{…}`` or ``\fbox{…}`` holds, braces inside it balanced; None if there is none.

    ``\boxed 5`` without braces holds the next word. Escaped braces ``\{`` are text.
    """
    start, command = max((solution.rfind(command), command) for command in ("\\boxed", "\\fbox"))
    if start < 0:
        return None
    rest = solution[start + len(command) :].lstrip()
    if not rest.startswith("{"):
        word = rest.split("$")[0].split()
        return word[0].rstrip(".,") if word else None
    depth = 0
    escaped = False
    for position, character in enumerate(rest):
        if not escaped and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return rest[1:position].strip()
        escaped = character == "\\" and not escaped
    return None


def _read(source: str, split: str) -> list[Row]:
    """Read the rows of ``split``, which may be a folder of one .json file per problem."""
    files = sorted(file for file in Path(source).glob(f"{split}/**/*.json") if file.is_file())
    if not files:
        return read_split(source, split, hub_config="default")
    rows = []
    for file in files:
        with boundary(f"{file} is not JSON in UTF-8"):
            row = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(row, dict):
            raise DataError(f"{file} is a JSON {type(row).__name__}, not an object")
        rows.append(row)
    return rows
