"""The columns of prepared data."""

from __future__ import annotations

from typing import Any

from rlcore_recipes.data.columns import Row

Splits = dict[str, list[Row]]
"""Rows by the name of their split, such as ``train`` and ``test``."""


def prompt_row(
    question: str, ground_truth: str, data_source: str, /, response: str | None = None, **extra_info: Any
) -> Row:
    """Return one row of a prepared data set.

    Args:
        question: becomes the prompt's user message.
        response: a solution written out in full, for SFT.
        extra_info: further fields, of the same types in every row.
    """
    row: Row = {
        "prompt": [{"role": "user", "content": question}],
        "ground_truth": ground_truth,
        "data_source": data_source,
        "extra_info": extra_info,
    }
    return row if response is None else {**row, "response": response}
