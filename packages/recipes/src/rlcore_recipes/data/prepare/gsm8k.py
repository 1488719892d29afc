"""GSM8K (Cobbe et al., 2021): https://github.com/openai/grade-school-math."""

from __future__ import annotations

import re

from pydantic import Field

from rlcore.config import Config, FileName
from rlcore.errors import DataError
from rlcore_recipes.data.prepare.rows import Splits, prompt_row
from rlcore_recipes.data.prepare.sources import field, read_split

_FINAL = re.compile(r"####\s*(-?[\d.,]+)\s*$")


class GSM8KOptions(Config):
    """Options of ``rlcore data gsm8k``."""

    source: FileName = Field(
        "openai/gsm8k", description="Folder with train.jsonl and test.jsonl (or .parquet), or Hub name."
    )
    instruction: str = Field(
        'Let\'s think step by step and output the final answer after "####".',
        description="Text after every question; may be empty.",
    )


def gsm8k(options: GSM8KOptions) -> Splits:
    """Grade-school word problems; answers end in '#### number'."""
    splits: Splits = {}
    for split in ("train", "test"):
        rows = splits[split] = []
        for number, row in enumerate(read_split(options.source, split, hub_config="main")):
            question = field(row, "question", options.source, number)
            answer = field(row, "answer", options.source, number)
            final = _FINAL.search(answer)
            if final is None:
                raise DataError(f"{options.source}, {split} row {number}: the answer does not end in '#### number'")
            rows.append(
                prompt_row(
                    f"{question} {options.instruction}".strip(),
                    final[1].replace(",", ""),
                    "openai/gsm8k",
                    response=answer,
                    split=split,
                    index=number,
                    question=question,
                )
            )
    return splits
