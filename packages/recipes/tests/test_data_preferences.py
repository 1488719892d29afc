"""Which tokens preference pairs hold, and which rows make no pair."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.errors import DataError
from rlcore_kit.testing.tiny_model import tiny_tokenizer
from rlcore_recipes.data.preferences import PairDataset, load_pairs
from rlcore_recipes.data.settings import PairDataSettings

TOKENIZER = tiny_tokenizer()


def load(path: Path, rows: list[dict[str, Any]], **settings: Any) -> PairDataset:
    path.write_text("".join(json.dumps({"data_source": "s", **row}) + "\n" for row in rows))
    return load_pairs(PairDataSettings(train_files=[str(path)], **settings), [str(path)], TOKENIZER)


def texts(data: PairDataset) -> list[tuple[str, str]]:
    """Each side as text, and the part that is learned."""
    batch = data.take(range(len(data)))
    sides = zip(batch["tokens"].to_list(), batch["loss_mask"].to_list())
    return [(TOKENIZER.decode(tokens), TOKENIZER.decode(tokens[mask.bool()])) for tokens, mask in sides]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [said("user", "1+1?")]
WRONG = said("assistant", "3")
CHAT = [
    ("<|user|>1+1?<|end|><|assistant|>2<|end|>", "2<|end|>"),
    ("<|user|>1+1?<|end|><|assistant|>3<|end|>", "3<|end|>"),
]
TEXT = [("1+1= 2<|end|>", " 2<|end|>"), ("1+1= 3<|end|>", " 3<|end|>")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": ASKED, "chosen": "2", "rejected": "3"}, CHAT),
        ({"prompt": ASKED, "chosen": [said("assistant", "2")], "rejected": [said("assistant", "3")]}, CHAT),
        ({"chosen": [*ASKED, said("assistant", "2")], "rejected": [*ASKED, said("assistant", "3")]}, CHAT),
        (
            {
                "prompt": "1+1?",
                "chosen": [*ASKED, said("assistant", "2")],
                "rejected": [*ASKED, said("assistant", "3")],
            },
            CHAT,
        ),
        ({"prompt": "1+1=", "chosen": " 2", "rejected": " 3"}, TEXT),
        ({"chosen": "1+1= 2", "rejected": "1+1= 3"}, TEXT),
    ],
)
def test_every_way_to_write_a_pair_gives_the_same_tokens(
    tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert texts(load(tmp_path / "a.jsonl", [row])) == expected


def test_a_pair_is_two_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": answer, "margin": 2} for answer in "cd"]
    batch = load(tmp_path / "a.jsonl", rows).take([1, 0, 1])
    assert batch["pair"].tolist() == [0, 0, 1, 1, 2, 2], "a pair that is drawn twice is two pairs"
    assert batch["side"].tolist() == [0, 1] * 3
    assert batch["margin"].tolist() == [2.0] * 6
    assert batch["margin"].dtype == torch.float32
    assert batch["data_source"] == ["s"] * 6


BAD = [
    ({"prompt": "q", "chosen": "", "rejected": "a"}, "with an empty side"),
    ({"prompt": "q", "chosen": None, "rejected": "a"}, "with an empty side"),
    ({"prompt": "q", "chosen": " \n", "rejected": "a"}, "with an empty side"),
    ({"prompt": ASKED, "chosen": [said("assistant", "")], "rejected": [said("assistant", "a")]}, "with an empty side"),
    ({"chosen": ASKED, "rejected": [*ASKED, said("assistant", "a")]}, "with an empty side"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "with two equal sides"),
    ({"prompt": "q", "chosen": "a", "rejected": "a<|end|>"}, "with two equal sides"),
    (
        {"chosen": [*ASKED, said("assistant", "2")], "rejected": [said("user", "?"), said("assistant", "2")]},
        "with a prompt that differs between the sides",
    ),
    (
        {"prompt": "2+2?", "chosen": [*ASKED, said("assistant", "2")], "rejected": [*ASKED, said("assistant", "3")]},
        "with a prompt that differs between the sides",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_rows_that_make_no_pair_are_counted_or_refused(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = tmp_path / "a.jsonl"
    good = {key: ("q", "a", "b")[index] for index, key in enumerate(("prompt", "chosen", "rejected")) if key in row}
    good = {"chosen": "q a", "rejected": "q b"} if "prompt" not in row else good
    data = load(path, [good, row, row])
    assert len(data) == 1
    assert [note for note in data.notes if reason in note] == [
        f"2 pairs {reason} are left out, the first: {path}, row 1"
    ]
    with pytest.raises(DataError, match=f"row 1: a pair {reason}"):
        load(path, [good, row], unusable="error")
    with pytest.raises(DataError, match=f"none of the 1 samples of .* can be used: 1 rows {reason}"):
        load(path, [row])


def test_each_side_has_its_own_length(tmp_path: Path) -> None:
    """The longer side is cut; the shorter one keeps its tokens. What is equal after the cut makes no pair."""
    path, long = tmp_path / "a.jsonl", "b" * 30
    rows = [{"prompt": "q", "chosen": "a", "rejected": long}]
    whole = texts(load(path, rows, max_length=64))
    chosen, rejected = texts(load(path, rows, max_length=8, overlong="truncate"))
    assert chosen == whole[0]
    assert rejected[0] == whole[1][0][:8]
    assert load(path, [*rows, {"prompt": "q", "chosen": "a", "rejected": "c"}], max_length=8).filtered == 1
    with pytest.raises(DataError, match=r"row 0: a side has \d+ tokens, more than data.max_length=8"):
        load(path, rows, max_length=8, overlong="error")
    same = {"prompt": "q", "chosen": long, "rejected": long + "c"}
    cut = load(path, [*rows, same], max_length=8, overlong="truncate")
    assert len(cut) == 1
    assert "1 pairs with two equal sides are left out" in " ".join(cut.notes)
    no_room = {"prompt": "q" * 20, "chosen": "a", "rejected": "b"}
    cut = load(path, [*rows, no_room], max_length=8, overlong="truncate")
    assert "1 pairs whose prompt leaves no room for an answer within data.max_length are left out" in " ".join(
        cut.notes
    )


@pytest.mark.parametrize(
    ("row", "settings", "problem"),
    [
        (
            {"prompt": "q", "chosen": 3, "rejected": "a"},
            {},
            "column 'chosen' must hold text or a list of messages, not 3",
        ),
        ({"prompt": "q", "chosen": ASKED, "rejected": "a"}, {}, "one side is text and the other a list of messages"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"}, {}, "'margin' must hold a finite number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": True}, {}, "'margin' must hold a finite number"),
        ({"prompt": "q", "chosen": "a"}, {}, "has no column 'rejected'"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, {"prompt_key": "query"}, "no column 'query'"),
    ],
)
def test_rows_of_another_form_are_refused(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        load(tmp_path / "a.jsonl", [row], **settings)
