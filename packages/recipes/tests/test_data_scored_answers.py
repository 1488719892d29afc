"""Answers and steps with labels: which tokens are scored."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.errors import DataError
from rlcore_kit.testing.tiny_model import tiny_tokenizer
from rlcore_recipes.data.scored_answers import ScoredDataset, load_scored_answers
from rlcore_recipes.data.settings import RewardDataSettings
from rlcore_recipes.data.steps import step_ends

TOKENIZER = tiny_tokenizer()


def load(
    path: Path, rows: list[dict[str, Any]], probabilities: bool = True, tokenizer: Any = TOKENIZER, **settings: Any
) -> ScoredDataset:
    path.write_text("".join(json.dumps({"data_source": "s", **row}) + "\n" for row in rows))
    found = RewardDataSettings(train_files=[str(path)], **settings)
    return load_scored_answers(found, [str(path)], tokenizer, probabilities=probabilities)


def scored(data: ScoredDataset, tokenizer: Any = TOKENIZER) -> list[list[tuple[str, float]]]:
    """Of each sample the text up to every scored token, and the label there."""
    batch = data.take(range(len(data)))
    found = []
    for tokens, mask, labels in zip(*(batch[name].to_list() for name in ("tokens", "loss_mask", "labels"))):
        assert torch.equal(mask.bool(), ~labels.isnan())
        places = mask.nonzero().flatten().tolist()
        found.append([(tokenizer.decode(tokens[: place + 1]), float(labels[place])) for place in places])
    return found


def steps(*texts: str, labels: Any, **others: Any) -> dict[str, Any]:
    return {"prompt": "q", "completions": list(texts), "labels": labels, **others}


def test_a_step_is_scored_where_its_separator_ends_and_the_last_one_at_the_end(tmp_path: Path) -> None:
    row = steps("ab", "cd", "e", labels=[True, True, False])
    assert scored(load(tmp_path / "a.jsonl", [row])) == [
        [("qab\n\n", 1.0), ("qab\n\ncd\n\n", 1.0), ("qab\n\ncd\n\ne<|end|>", 0.0)]
    ]
    asked = {**row, "prompt": [{"role": "user", "content": "q"}]}
    [(*_, last)] = scored(load(tmp_path / "a.jsonl", [asked], step_separator="\n"))
    assert last == ("<|user|>q<|end|><|assistant|>ab\ncd\ne<|end|>", 0.0)


def test_a_separator_may_be_part_of_a_token(tmp_path: Path) -> None:
    """As ".\\n\\n" and "\\n\\n" are in the vocabularies of usual models, where the separator alone is another token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|end|>", "<|unk|>", "q", "a", "b", ".\n\n", "\n\n", "\n\nb"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(pattern=Regex("\\.\n\n|\n\nb|\n\n|."), behavior="isolated")
    kind: Any = PreTrainedTokenizerFast
    tokenizer = kind(tokenizer_object=core, eos_token="<|end|>", unk_token="<|unk|>")
    data = load(tmp_path / "a.jsonl", [steps("a.", "a", "ba", labels=[1, 0, 1])], tokenizer=tokenizer)
    batch = data.take([0])
    assert [words[token] for token in batch.flat("tokens")] == ["q", "a", ".\n\n", "a", "\n\nb", "a", "<|end|>"]
    assert batch.flat("loss_mask").nonzero().flatten().tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    ("text", "ends"),
    [("ab", [1]), ("ab\n\n", [3]), ("a\n\n\n\nb", [2, 5]), ("\n\na", [2]), ("a\nb", [2]), ("", []), ("\n\n", [])],
)
def test_steps_of_completions(text: str, ends: list[int]) -> None:
    assert step_ends(TOKENIZER(text)["input_ids"], TOKENIZER, "\n\n") == ends


def test_as_many_tokens_are_scored_as_there_are_steps(tmp_path: Path) -> None:
    path, good = tmp_path / "a.jsonl", steps("a", "b", labels=[1, 0])
    data = load(path, [good, steps("a\n\nb", "c", labels=[1, 0]), steps("a", "", labels=[1, 0])])
    assert data.take(range(len(data))).flat("loss_mask").sum() == 2
    assert "2 samples whose steps are not found in the tokens of the answer" in " ".join(data.notes)
    assert f"the first: {path}, row 1" in " ".join(data.notes)
    with pytest.raises(DataError, match="can be used: 1 rows whose steps are not found"):
        load(path, [steps("a\n\nb", "c", labels=[1, 0])])
    assert scored(load(path, [steps("a", "b", labels=[None, 1])])) == [[("qa\n\nb<|end|>", 1.0)]], "null is no label"
    assert "1 samples without a label" in " ".join(load(path, [good, steps("a", labels=[None])]).notes)
    cut = load(path, [steps("ab", "c" * 20, labels=[1, 0])], max_length=8, overlong="truncate")
    assert scored(cut) == [[("qab\n\n", 1.0)]], "the end of the second step is cut off, and with it its label"


def test_an_answer_is_scored_at_its_last_token(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": "ab", "label": True}, {"prompt": "q", "response": "c" * 20, "label": False}]
    data = load(tmp_path / "a.jsonl", rows, max_length=8, overlong="truncate")
    assert scored(data) == [[("qab<|end|>", 1.0)], [("q" + "c" * 7, 0.0)]]
    data = load(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "ab", "score": 7.5}], probabilities=False)
    assert scored(data) == [[("qab<|end|>", 7.5)]]
    assert data.take([0])["data_source"] == ["s"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (steps("a", "b", labels=[1]), "a label for each of the 2 steps, not 1 labels"),
        (steps("a", "b", labels=["+", "-"]), "must be true, false or a finite number, not '\\+'"),
        (steps("a", labels=[-100]), "a label is -100, and actor.objective.loss=bce takes labels from 0 to 1"),
        (steps("a", labels=True), "must hold a list with a label for each of the 1 steps, not True"),
        ({"prompt": "q", "completions": "a", "labels": [1]}, "must hold a list of texts, the steps, not 'a'"),
        ({"prompt": "q", "response": "a", "label": "good"}, "must be true, false or a finite number"),
        ({"prompt": "q", "response": "a"}, "has no column 'label'"),
    ],
)
def test_labels_of_the_wrong_type_are_refused(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        load(tmp_path / "a.jsonl", [row])


def test_labels_that_are_no_probabilities_are_for_regression(tmp_path: Path) -> None:
    assert scored(load(tmp_path / "a.jsonl", [steps("a", labels=[-3])], probabilities=False)) == [[("qa<|end|>", -3.0)]]
    with pytest.raises(DataError, match="finite number, not nan"):
        load(tmp_path / "a.jsonl", [steps("a", labels=[math.nan])], probabilities=False)


def test_an_answer_has_a_label_for_each_output(tmp_path: Path) -> None:
    """A missing one is left out; an answer without any is counted."""
    rows = [
        {"prompt": "q", "response": "a", "good": 1, "short": 0.5},
        {"prompt": "q", "response": "b", "good": None, "short": 0.25},
        {"prompt": "q", "response": "c", "good": None, "short": None},
    ]
    data = load(tmp_path / "a.jsonl", rows, label_key=["good", "short"])
    batch = data.take(range(len(data)))
    labels = batch.flat("labels")
    assert labels.shape == (batch.total_tokens, 2)
    found = labels[batch.flat("loss_mask").bool()]
    torch.testing.assert_close(found, torch.tensor([[1, 0.5], [math.nan, 0.25]]), equal_nan=True)
    assert "without a label" in str(data.notes)
    with pytest.raises(DataError, match="'long'"):
        load(tmp_path / "a.jsonl", rows, label_key=["good", "long"])
