"""Which optional packages a configuration needs: its models name them, and they are looked for before a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from rlcore.config.base import Config
from rlcore.config.sections import PluginSections
from rlcore.packages import Package


def missing_packages(config: Config) -> list[tuple[str, str]]:
    """Return each key of ``config`` that needs a package which is not installed, and what to do about it.

    Sections of plugins that are not named are left out.
    """
    return [(key, package.advice) for key, package in _needed(config, "") if not package.installed]


def missing_by_default(model: type[Config]) -> list[Package]:
    """Return the packages that ``model`` needs with its defaults and that are not installed.

    A model with required keys has no defaults to ask.
    """
    try:
        config = model()
    except ValidationError:
        return []
    return [package for _, package in _needed(config, "") if not package.installed]


def _needed(value: Any, path: str) -> Iterator[tuple[str, Package]]:
    inner: Iterator[tuple[str, Any]] = iter(())
    if isinstance(value, Config):
        yield from ((_join(path, key), package) for key, package in value.packages())
        inner = ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, Mapping):
        inner = iter(value.items())
    elif isinstance(value, (list, tuple)):
        inner = ((str(index), item) for index, item in enumerate(value))
    for key, item in inner:
        yield from _needed(item, _join(path, str(key)))
    if isinstance(value, PluginSections):
        for name in value.named:
            yield from _needed(value.options_of(name), _join(path, name))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
