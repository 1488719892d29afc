"""Tokens that end a completion, tokens that the reward reads, and tokens that the model does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlcore.errors import RlcoreWarning
from rlcore_kit.testing.tiny_model import tiny_model, tiny_tokenizer

END, OTHER_END = 1, 100
SFT_KEYS = ("data.train_files", "data.train_batch_size", "trainer.trackers", "trainer.total_steps")
REWARD = """
import json
def seen(sample):
    with open({path!r}, "a") as file:
        print(json.dumps([sample.completion, list(sample.completion_tokens), sample.finish_reason]), file=file)
    return 0.5
"""


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose end token is another one than that of its tokenizer and chat template."""
    return tiny_model(tmp_path_factory.mktemp("base"), eos_token_id=OTHER_END)


def sft_keys(task: Any) -> dict[str, Any]:
    return {**dict.fromkeys(task.keys), **{key: task.keys[key] for key in SFT_KEYS}}


def ends_of(folder: Path) -> list[Any]:
    return [
        json.loads((folder / name).read_text())["eos_token_id"] for name in ("config.json", "generation_config.json")
    ]


def test_completions_end_at_the_templates_end_token_and_rewards_may_read_special_tokens(
    task: Any, tmp_path: Path, base_model: Path
) -> None:
    record = tmp_path / "seen.jsonl"
    (tmp_path / "reward.py").write_text(REWARD.format(path=str(record)))
    changes = {
        "model.path": base_model,
        "reward.path": f"{tmp_path / 'reward.py'}:seen",
        "reward.keep_special_tokens": True,
        "data.max_response_length": 64,
        "trainer.total_steps": 1,
        "trainer.save_hf": True,
    }
    with pytest.warns(RlcoreWarning, match=rf"end with {END} '<\|end\|>', which is not .*\({OTHER_END} "):
        assert task.run("grpo", tmp_path / "out", changes).exit_code == 0
    tokenizer = tiny_tokenizer()
    samples = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(samples) == 32
    for text, tokens, reason in samples:
        assert (reason == "stop") == (tokens[-1] in (END, OTHER_END))
        assert not {END, OTHER_END} & set(tokens[:-1])
        assert text == tokenizer.decode(tokens[:-1] if reason == "stop" else tokens)
    assert any(tokens[-1] == END for _, tokens, _ in samples)
    assert any("<|" in text for text, _, _ in samples), "special tokens"
    assert ends_of(tmp_path / "out" / "model") == [[END, OTHER_END]] * 2


def test_sft_exports_the_end_token_that_it_taught_and_notices_other_data(
    task: Any, tmp_path: Path, base_model: Path
) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(task.train.read_text())
    keys = {
        **sft_keys(task),
        "model.path": base_model,
        "data.train_files": train,
        "trainer.save_freq": 1,
        "trainer.save_hf": True,
    }

    def run(steps: int) -> Any:
        return task.run("sft", tmp_path / "out", {**keys, "trainer.total_steps": steps})

    with pytest.warns(RlcoreWarning, match="an exported model has both"):
        assert run(1).exit_code == 0
    assert ends_of(tmp_path / "out" / "model") == [[END, OTHER_END]] * 2
    train.write_text(task.train.read_text().replace("abcd", "abce"))
    with pytest.warns(RlcoreWarning):
        result = run(2)
    assert result.exit_code == 1
    assert "train file 1 (of data.train_files) has as many samples as before but holds others" in result.output


def test_a_run_in_which_nothing_ends_a_completion_says_so(task: Any, tmp_path: Path) -> None:
    """Neither the model nor its tokenizer names an end token that the model knows."""
    model = tiny_model(tmp_path / "model", eos_token_id=None)
    for name in ("tokenizer_config.json", "generation_config.json"):
        values = json.loads((model / name).read_text())
        values.pop("eos_token", None)
        (model / name).write_text(json.dumps(values))
    changes = {"model.path": model, "trainer.total_steps": 1, "data.apply_chat_template": "never"}
    with pytest.warns(RlcoreWarning, match="nothing ends a completion before its longest length"):
        result = task.run("grpo", tmp_path / "out", changes)
    assert result.exit_code == 0
    assert "none: completions end at their longest length" in result.output


def test_tokens_beyond_the_models_vocabulary_are_found_before_it_is_built(task: Any, tmp_path: Path) -> None:
    small = tiny_model(tmp_path / "small", vocab_size=240)
    val = task.write("odd.jsonl", 3)
    lines = val.read_text().splitlines()
    val.write_text("\n".join([*lines[:2], lines[2].replace("say", "\u00e0")]))
    largest = max(tiny_tokenizer()("\u00e0")["input_ids"])
    assert largest > 240 > max(tiny_tokenizer()("say 0123456789 abcd")["input_ids"])
    for recipe in ("grpo", "sft"):
        keys = sft_keys(task) if recipe == "sft" else {}
        changes = {**keys, "data.val_files": val, "trainer.test_freq": 1, "model.path": small}
        result = task.run(recipe, tmp_path / "out", changes)
        assert result.exit_code == 1
        message = " ".join(result.output.split())
        assert f"odd.jsonl, row 2: token {largest} " in message
        assert "beyond the model's vocabulary of 240" in message
    assert not (tmp_path / "out").exists()
