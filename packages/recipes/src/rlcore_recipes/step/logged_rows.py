"""Rows of the tables of completions that trackers show."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

from rlcore.batch import Batch
from rlcore_recipes.run.records import Table

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


OF_EPISODES = ("transcript", "invalid")
"""Further columns of tables and batches where an environment made the samples."""


def table_of(batch: Batch, chosen: Iterable[int]) -> Table:
    """Return the table of the samples ``chosen``; the prompt still as token ids (see `with_prompts`).

    Args:
        batch: with `BATCH_COLUMNS`, and perhaps `OF_EPISODES`.
    """
    tokens, episodes = batch["tokens"].to_list(), set(OF_EPISODES) <= set(batch.names)
    rows = [
        [
            tokens[i][: batch["prompt_length"][i]].tolist(),
            batch["completion"][i],
            str(batch["ground_truth"][i]),
            float(batch["score"][i]),
            batch["data_source"][i],
            int(batch["group"][i]),
            batch["finish_reason"][i],
            _json(dict(batch["reward_result"][i].extras)),
            batch["reward_result"][i].error or "",
            *([_json(list(batch["transcript"][i])), batch["invalid"][i]] if episodes else ()),
        ]
        for i in chosen
    ]
    return Table(COLUMNS + OF_EPISODES if episodes else COLUMNS, rows)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def with_prompts(table: Table, tokenizer: Any) -> Table:
    """Return ``table`` with the prompts as the model sees them, special tokens included."""
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Table(table.columns, [[decode(prompt), *rest] for prompt, *rest in table.rows])
