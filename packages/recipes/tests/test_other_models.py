"""Critic and reference read the policy's tokens: another tokenizer is refused before anything is built."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlcore.engines import ModelSettings
from rlcore.errors import DataError
from rlcore_kit.testing.tiny_model import tiny_model, tiny_tokenizer
from rlcore_recipes.run.other_models import check_other_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The policy's model, one whose tokenizer numbers two letters the other way round, and one without a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    policy = tiny_model(folder / "policy")
    shutil.copytree(policy, folder / "swapped")
    file = folder / "swapped" / "tokenizer.json"
    text = file.read_text()
    first, second = (text[text.index(f'"{letter}": ') :].split(",")[0] for letter in "ab")
    numbers = [part.split(": ")[1] for part in (first, second)]
    file.write_text(text.replace(first, f'"a": {numbers[1]}').replace(second, f'"b": {numbers[0]}'))
    shutil.copytree(policy, folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    return {name: folder / name for name in ("policy", "swapped", "bare")}


def check(models: dict[str, Path], critic: str | None = None, ref: str | None = None) -> None:
    def settings(name: str | None) -> Any:
        return SimpleNamespace(model=None if name is None else ModelSettings(path=str(models[name])))

    config: Any = SimpleNamespace(
        reward_model=None,
        critic_role=settings(critic),
        prm_role=None,
        needs_ref=True,
        ref=settings(ref),
        model=settings("policy").model,
    )
    check_other_models(config, tiny_tokenizer())


@pytest.mark.parametrize("role", ["critic", "ref"])
def test_models_with_other_tokens_are_refused(models: dict[str, Path], role: str) -> None:
    for name in ("policy", "bare"):
        check(models, **{role: name})
    with pytest.raises(DataError, match=rf"{role}\.model\.path=.*swapped has another vocabulary .* same tokenizer"):
        check(models, **{role: "swapped"})


def test_the_policys_own_model_needs_no_check(models: dict[str, Path]) -> None:
    check(models)
