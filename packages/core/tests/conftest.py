"""Third-party packages made on the spot, for tests of plugins; and no deadlines, which a busy machine misses."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

from rlcore import plugins

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

Distribution = Callable[..., Path]


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distribution]:
    """``distribution(name, points, modules)`` installs version 1.5 of a package.

    ``points`` maps groups to {name: "module:attribute"}, ``modules`` names to source text. Returns the folder to put on
    another process's PYTHONPATH.
    """
    modules_before = set(sys.modules)
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, points: Mapping[str, Mapping[str, str]], modules: Mapping[str, str]) -> Path:
        info = site / f"{name.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        sections = [
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in members.items()) for group, members in points.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(sections))
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
        importlib.invalidate_caches()
        forget_installed()
        return site

    yield install
    for module in set(sys.modules) - modules_before:
        spec = getattr(sys.modules[module], "__spec__", None)  # a namespace package has folders and no file
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec is not None else []
        if any(str(place).startswith(str(site)) for place in places):
            del sys.modules[module]
    monkeypatch.undo()
    forget_installed()


def forget_installed() -> None:
    """Have plugins look for installed packages again."""
    plugins._points.cache_clear()
    plugins.import_algorithms.cache_clear()
