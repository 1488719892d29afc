"""Rows that are tokenised already: ``input_ids`` with ``labels`` or a mask of the same length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlcore.errors import DataError
from rlcore_recipes.data.columns import Row
from rlcore_recipes.data.encoding import Encoded

MASKS = ("loss_mask", "labels", "completion_mask", "assistant_masks")
"""Columns that say what is learned: ours, transformers', and TRL's two."""
LABELS = "labels"
IGNORED = -100
"""The label of a token that is not learned."""
ATTENTION, POSITIONS = "attention_mask", "position_ids"


def mask_column(names: Sequence[str], file: str) -> str:
    """Return the column of a file with ``input_ids`` that says what is learned.

    Raises:
        DataError: there is none or there are several.
    """
    found = [name for name in MASKS if name in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{file} has {' and '.join(found)}, which may differ in what is learned; keep one of them")
    raise DataError(
        f"{file} has tokens and no column that says which of them are learned; add loss_mask (1 on learned tokens) or "
        f"labels ({IGNORED} on the others), as long as input_ids"
    )


def read_tokens(row: Row, key: str, mask_key: str, where: str) -> Encoded:
    """Return tokens and loss mask of a row, without padding.

    Raises:
        DataError: the columns differ in length, hold something else, or the row holds several packed samples.
    """
    ids = _numbers(row.get(key), f"{where}: column {key!r}")
    marks = _numbers(row.get(mask_key), f"{where}: column {mask_key!r}", IGNORED)
    attention = row.get(ATTENTION)
    columns = {mask_key: marks} if attention is None else {mask_key: marks, ATTENTION: attention}
    for name, values in columns.items():
        if len(values) != len(ids):
            raise DataError(f"{where}: column {name!r} has {len(values)} entries for {len(ids)} tokens")
    if mask_key == LABELS:
        mask = _from_labels(ids, marks, where)
    elif {*marks} <= {0, 1}:
        mask = [float(mark) for mark in marks]
    else:
        raise DataError(f"{where}: column {mask_key!r} must hold 0 and 1 alone")
    start, end = _attended(attention, len(ids), where)
    if row.get(POSITIONS) is not None and list(row[POSITIONS])[start:end] != list(range(end - start)):
        raise DataError(
            f"{where}: the positions do not count from 0, so the row seems to hold several packed samples; make one "
            "row per sample (rlcore packs them itself)"
        )
    ids, mask = ids[start:end], mask[start:end]
    # nothing precedes the first token, from which it could be learned
    return ids, [0.0, *mask[1:]]  # shift allowed: the first token


def _from_labels(ids: list[int], labels: list[int], where: str) -> list[float]:
    for place, (token, label) in enumerate(zip(ids, labels)):
        if label not in (token, IGNORED):
            raise DataError(
                f"{where}: label {place} is {label}, and the token there is {token}; labels hold the token itself, or "
                f"{IGNORED} where it is not learned, and are not shifted"
            )
    return [float(label != IGNORED) for label in labels]


def _attended(attention: Sequence[int] | None, length: int, where: str) -> tuple[int, int]:
    """Return where the tokens that are no padding begin and end."""
    if attention is None:
        return 0, length
    kept = [place for place, attended in enumerate(attention) if attended]
    if not kept:
        return 0, 0
    start, end = kept[0], kept[-1] + 1
    if len(kept) != end - start:
        raise DataError(f"{where}: {ATTENTION} has gaps; only padding before or after the tokens can be left out")
    return start, end


def _numbers(value: Any, what: str, lowest: int = 0) -> list[int]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{what} must hold a list of numbers, not {value!r:.100}")
    if not all(type(number) is int for number in value):
        raise DataError(f"{what} must hold whole numbers alone")
    if min(value) < lowest or max(value) >= 2**31:
        raise DataError(f"{what} has numbers that are no token ids")
    return value
