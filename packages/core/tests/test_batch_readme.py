"""The Python in this package's README runs, from top to bottom."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlcore.algorithms.registries import advantages

README = Path(__file__).parents[1] / "README.md"
MINE = """
from rlcore.config import Config
from rlcore.plugins import Plugin

class MySettings(Config):
    param_dtype: str = "float32"

engine = Plugin(interface=1, config="my_package:MySettings", factory="my_package:MySettings", summary="My engine.")
"""


@pytest.fixture
def forget_algorithms() -> Iterator[None]:
    yield
    advantages._entries.pop("plain", None)


def test_readme(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    distribution: Callable[..., Path],
    forget_algorithms: None,
) -> None:
    """Run in one namespace, in a folder with the files and the plugin of the text."""
    distribution("my-package", {"rlcore.train_engines": {"mine": "my_package:engine"}}, {"my_package": MINE})
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("batch_size: 64\n")
    text = README.read_text()
    names: dict[str, object] = {"__name__": "readme"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(README), "exec"), names)  # errors point at the README's lines
    printed = capsys.readouterr().out
    assert "Batch: 2 samples, 5 tokens (2 to 3 each)" in printed
    assert "score       dense float32 [2] on cpu" in printed
    config = names["config"]
    assert config.batch_size == 64
    assert config.actor.options.param_dtype == "bfloat16"
    assert config.actor.engine == "mine"


def test_every_module_that_the_readme_names_exists() -> None:
    from importlib import import_module

    for module, attribute in set(re.findall(r"`(rlcore(?:\.[a-z_]+)+)(?:\.([A-Z]\w+))?`", README.read_text())):
        found = import_module(module) if module not in ("rlcore.train_engines", "rlcore.commands") else None
        assert found is None or not attribute or hasattr(found, attribute)
