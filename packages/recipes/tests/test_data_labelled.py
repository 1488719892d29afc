"""Single answers with labels: what is read, and which rows a KL divergence is estimated from."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlcore.errors import DataError
from rlcore_kit.testing.tiny_model import tiny_tokenizer
from rlcore_recipes.data.labelled import BAD, GOOD, MISMATCHED, LabelledDataset, load_labelled, partners_of
from rlcore_recipes.data.mixture import by_source
from rlcore_recipes.data.settings import PreferenceDataSettings

TOKENIZER = tiny_tokenizer()


def load(path: Path, rows: list[dict[str, Any]], mismatched: bool = True, **settings: Any) -> LabelledDataset:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceDataSettings(train_files=[str(path)], **settings)
    return load_labelled(data, data.train_files, TOKENIZER, mismatched=mismatched)


def shown(data: LabelledDataset) -> list[tuple[str, str, int]]:
    """Each row's prompt, answer and kind."""
    batch = data.take(range(len(data)))
    rows = zip(batch["tokens"].to_list(), batch["loss_mask"].to_list(), batch["side"].tolist())
    return [(TOKENIZER.decode(ids[~mask.bool()]), TOKENIZER.decode(ids[mask.bool()]), side) for ids, mask, side in rows]


ROWS = [
    {"prompt": "1+1=", "completion": "2", "label": True},
    {"prompt": "1+1=", "completion": "3", "label": False},
    {"prompt": "2+2=", "completion": "4", "label": 1},
]


def test_an_answer_and_that_of_another_prompt(tmp_path: Path) -> None:
    data = load(tmp_path / "a.jsonl", ROWS)
    assert shown(data) == [
        ("1+1=", "2<|end|>", GOOD),
        ("1+1=", "4<|end|>", MISMATCHED),
        ("1+1=", "3<|end|>", BAD),
        ("1+1=", "4<|end|>", MISMATCHED),
        ("2+2=", "4<|end|>", GOOD),
        ("2+2=", "2<|end|>", MISMATCHED),
    ]
    assert data.take([2, 0])["pair"].tolist() == [0, 0, 1, 1]
    plain = load(tmp_path / "a.jsonl", ROWS, mismatched=False)
    assert [kind for _, _, kind in shown(plain)] == [GOOD, BAD, GOOD]


def test_mixing_sources_keeps_the_partners(tmp_path: Path) -> None:
    rows = [{**row, "data_source": name} for row, name in zip(ROWS, "bab")]
    mixed, _ = by_source(load(tmp_path / "a.jsonl", rows), {"a": 1, "b": 1})
    answers = [answer for _, answer, _ in shown(mixed)]
    assert answers[::2] == ["3<|end|>", "2<|end|>", "4<|end|>"]
    assert answers[1::2] == ["4<|end|>", "4<|end|>", "2<|end|>"]


def test_a_pair_gives_a_good_and_a_bad_answer(tmp_path: Path) -> None:
    user = {"role": "user", "content": "a"}
    sides = {side: [user, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    data = load(tmp_path / "a.jsonl", [sides], mismatched=False)
    assert [(answer, kind) for _, answer, kind in shown(data)] == [("chosen<|end|>", GOOD), ("rejected<|end|>", BAD)]
    assert "a.jsonl: a pair is taken for a good and a bad answer" in " ".join(data.notes)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"label": "yes"}, "with a label that is neither true nor false"),
        ({"label": None}, "with a label that is neither true nor false"),
        ({"label": 0.5}, "with a label that is neither true nor false"),
        ({"label": -1}, "with a label that is neither true nor false"),
        ({"completion": " "}, "with an empty answer"),
        ({"completion": None}, "with an empty answer"),
    ],
)
def test_rows_without_a_signal_are_counted_and_named_or_refused(
    tmp_path: Path, bad: dict[str, Any], reason: str
) -> None:
    rows = [ROWS[0], {**ROWS[1], **bad}, ROWS[2]]
    data = load(tmp_path / "a.jsonl", rows)
    assert len(data) == 2
    assert f"1 samples {reason} are left out, the first: {tmp_path}/a.jsonl, row 1" in data.notes
    with pytest.raises(DataError, match=f"row 1: a sample {reason}.*data.unusable=filter"):
        load(tmp_path / "a.jsonl", rows, unusable="error")


def test_equal_answers_have_no_partner(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all answers of the data set are the same"):
        load(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[0], "prompt": "b"}])
    assert len(load(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[0], "prompt": "b"}], mismatched=False)) == 2


def test_a_partners_answer_is_cut_to_the_maximum_length(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "prompt": "a" * 6}, {**ROWS[2], "completion": "b" * 6}]
    data = load(tmp_path / "a.jsonl", rows, max_length=12)
    assert [len(ids) for ids in data.take([0])["tokens"].to_list()][1] == 12


@pytest.mark.parametrize(
    ("prompts", "answers"),
    [
        ([1, 1, 1, 1, 1], [1, 2, 3, 2, 1]),
        ([1, 1, 2, 2, 3], [7, 8, 7, 8, 7]),
        ([1, 2, 3, 4, 5], [7, 7, 7, 7, 8]),
        ([1] * 99 + [2], [7] * 50 + [8] * 50),
        ([place // 3 for place in range(300)], [place % 2 for place in range(300)]),
    ],
)
def test_a_partner_never_has_the_same_answer_and_mostly_another_prompt(prompts: list[int], answers: list[int]) -> None:
    partners = partners_of(prompts, answers)
    assert all(answers[index] != answers[partner] for index, partner in enumerate(partners))
    if len({*prompts}) > 2:
        assert all(prompts[index] != prompts[partner] for index, partner in enumerate(partners))


def test_an_answer_may_be_a_message_or_a_list_of_them(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "2"}
    rows = [{"prompt": [{"role": "user", "content": "1+1"}], "completion": said, "label": True}]
    rows += [{**rows[0], "completion": [{**said, "content": "3"}], "label": False}]
    found = shown(load(tmp_path / "a.jsonl", rows, mismatched=False))
    assert [(answer, kind) for _, answer, kind in found] == [("2<|end|>", GOOD), ("3<|end|>", BAD)]
