"""The registries and their reference page say the same, and the page's example works."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
import torch

from rlcore import algorithms
from rlcore.batch import Batch, Jagged
from rlcore.config import Algorithm, AlgorithmField, Config
from rlcore.config.registry import Entry, Registry

PAGE = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text(encoding="utf-8")
SECTIONS = {
    "advantages": "Advantage estimators",
    "policy_losses": "Policy losses",
    "aggregations": "Loss aggregation",
    "kl_estimators": "KL estimators",
    "divergences": "Divergences",
    "value_losses": "Value losses",
    "reward_losses": "Losses of reward models",
    "corrections": "Off-policy corrections",
    "sampling_filters": "Sampling filters",
    "preference_losses": "Preference losses",
    "pair_builders": "Pair builders",
    "sample_selectors": "Sample selectors",
}


ENTRIES: list[tuple[str, Entry]] = [
    (name, entry)
    for name, registry in vars(algorithms).items()
    if isinstance(registry, Registry)
    for entry in registry
    if entry.function.__module__.startswith("rlcore.")  # not those of installed plugins
]


def described(registry: str, entry: Entry) -> str:
    """The part of the page about ``entry``: under its own heading, or its row in the section's table."""
    chapter = PAGE.split(f"\n## {SECTIONS[registry]}\n")[1].split("\n## ")[0]
    quoted = f"`{entry.name}`"
    for part in chapter.split("\n### "):
        if quoted in part.split("\n")[0]:
            return part
    return next((line for line in chapter.split("\n") if line.startswith(f"| {quoted} |")), "")


EVERY = pytest.mark.parametrize(
    ("registry", "entry"), ENTRIES, ids=[f"{registry}-{entry.name}" for registry, entry in ENTRIES]
)


@EVERY
def test_page_describes_the_entry_and_its_parameters(registry: str, entry: Entry) -> None:
    text = described(registry, entry)
    assert text, f"{entry.kind} {entry.name!r} is missing in docs/algorithms.md"
    for name, parameter in entry.params.model_fields.items():
        row = re.search(rf"^\| `{name}` \| (.*?) \|", text, re.MULTILINE)
        assert row, f"parameter {name!r} of {entry.name!r} has no row"
        if parameter.is_required():
            assert row[1] == "(required)"
        elif isinstance(parameter.default, float):
            assert float(row[1]) == parameter.default
        else:
            assert row[1] == str(parameter.default).lower()
        assert parameter.description


@EVERY
def test_docstring_starts_with_a_summary_and_names_its_source(registry: str, entry: Entry) -> None:
    documentation = entry.function.__doc__ or ""
    assert entry.summary
    assert re.search(r"Source: .*\d{4}", documentation, re.DOTALL), f"{entry.name} cites no source"


def test_page_lists_nothing_that_does_not_exist() -> None:
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    listed = {name for heading in headings for name in re.findall(r"`(.+?)`", heading)}
    assert listed <= {entry.name for _, entry in ENTRIES}


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code
    (tmp_path / "my_estimators.py").write_text(code[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(algorithms.advantages, "_entries", dict(algorithms.advantages._entries))
    importlib.import_module("my_estimators")
    yield
    del sys.modules["my_estimators"]


def test_example_of_an_own_estimator(example: None) -> None:
    class Settings(Config):
        advantage: Annotated[Algorithm, AlgorithmField(algorithms.advantages)]

    choice = pickle.loads(pickle.dumps(Settings(advantage={"name": "mine", "threshold": 0.25}).advantage))
    lengths = torch.tensor([3, 2])
    batch = Batch(
        {
            "loss_mask": Jagged(torch.tensor([0, 1, 1, 0, 1]), lengths),
            "token_rewards": Jagged(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]), lengths),
        }
    )
    assert choice(batch).advantages.tolist() == [0.0, 0.75, 0.75, 0.0, -0.25]


def test_example_fits_into_twenty_lines() -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code
    assert len([line for line in code[1].splitlines() if line.strip()]) < 20
