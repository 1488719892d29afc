"""Suggestions for names that are not there."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from rlcore.suggestions import definitions_of, similar_paths


@pytest.mark.parametrize(
    ("missing", "meant"),
    [
        ("models/Qwen2.5-0.5B-instruct", "models/Qwen2.5-0.5B-Instruct"),
        ("model/Qwen2.5-0.5B-Instruct", "models"),
        ("models/xyz", None),
    ],
)
def test_similar_paths(tmp_path: Path, missing: str, meant: str | None) -> None:
    (tmp_path / "models" / "Qwen2.5-0.5B-Instruct").mkdir(parents=True)
    expected = "" if meant is None else f"; did you mean {tmp_path}/{meant}?"
    assert similar_paths(tmp_path / missing) == expected


def test_functions_and_classes_of_a_module() -> None:
    module = ModuleType("mine")
    assert definitions_of(module) == "; it has no functions or classes"
    exec("from os.path import join\nlimit = 3\ndef score(x): ...\ndef other(x): ...\nclass C: ...", vars(module))
    assert definitions_of(module) == "; it has score, other, C"
    exec("\n".join(f"def f{number}(): ..." for number in range(30)), vars(module))
    assert definitions_of(module).endswith("f16 and 13 more")
