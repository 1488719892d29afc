"""Rows of the tables of completions that trackers show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from rlcore.batch import Batch

COLUMNS = (
    "prompt",
    "completion",
    "ground_truth",
    "score",
    "data_source",
    "group",
    "finish_reason",
    "reward_parts",
    "error",
)
BATCH_COLUMNS = (
    "tokens",
    "prompt_length",
    "completion",
    "ground_truth",
    "score",
    "data_source",
    "group",
    "finish_reason",
    "reward_result",
)


def rows_of(batch: Batch, chosen: Iterable[int]) -> list[list[Any]]:
    """Return the rows of the samples ``chosen``; the prompt still as token ids (see `with_prompts`).

    Args:
        batch: with `BATCH_COLUMNS`.
    """
    tokens = batch["tokens"].to_list()
    return [
        [
            tokens[i][: batch["prompt_length"][i]].tolist(),
            batch["completion"][i],
            str(batch["ground_truth"][i]),
            float(batch["score"][i]),
            batch["data_source"][i],
            int(batch["group"][i]),
            batch["finish_reason"][i],
            json.dumps(dict(batch["reward_result"][i].extras), ensure_ascii=False, default=str),
            batch["reward_result"][i].error or "",
        ]
        for i in chosen
    ]


def with_prompts(rows: Sequence[Sequence[Any]], tokenizer: Any) -> list[list[Any]]:
    """Return ``rows`` with the prompts as the model sees them, special tokens included."""
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [[decode(prompt), *rest] for prompt, *rest in rows]
