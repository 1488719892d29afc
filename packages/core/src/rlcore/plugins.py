"""Plugins: backends, rewards, recipes and trackers that installed packages offer by entry point.

Nothing is imported until its name is used. An entry point of one of the groups in `GROUPS` names a `Plugin`, which in
turn names its configuration model and its factory by import path, so that a configuration can be checked without
importing the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

from rlcore.boundary import boundary, reason
from rlcore.errors import PluginError, RlcoreWarning
from rlcore.packages import Package

if TYPE_CHECKING:
    from rlcore.config.base import Config

# group -> (what a member is called, interface version this core speaks)
GROUPS: dict[str, tuple[str, int]] = {
    "rlcore.train_engines": ("training engine", 1),
    "rlcore.rollout_engines": ("rollout engine", 1),
    "rlcore.rewards": ("reward", 1),
    "rlcore.recipes": ("recipe", 1),
    "rlcore.trackers": ("tracker", 1),
}
ALGORITHMS = "rlcore.algorithms"
COMMANDS = "rlcore.commands"

# our own packages, so that a missing one can be named: (group, plugin) -> what to install
OURS: dict[tuple[str, str], str] = {
    ("rlcore.train_engines", "fsdp"): "rlcore[fsdp]",
    ("rlcore.train_engines", "megatron"): "rlcore[megatron]",
    ("rlcore.rollout_engines", "inline"): "rlcore[fsdp]",
    ("rlcore.rollout_engines", "vllm"): "rlcore[vllm]",
    ("rlcore.rollout_engines", "sglang"): "rlcore[sglang]",
    **{("rlcore.rewards", name): "rlcore-rewards" for name in ("gsm8k", "math", "function", "combine")},
    **{("rlcore.recipes", name): "rlcore[fsdp]" for name in ("sft", "grpo", "ppo", "dapo")},
    **{("rlcore.trackers", name): "rlcore-recipes" for name in ("console", "jsonl", "wandb", "tensorboard")},
    **{(COMMANDS, name): "rlcore[fsdp]" for name in ("quickstart", "data", "model", "plan")},
}


@dataclass(frozen=True)
class Plugin:
    """What an entry point names.

    Attributes:
        interface: version of the interface the plugin was written for (`GROUPS`).
        config: ``module:attribute`` of its `Config` subclass (importable without the backend).
        factory: ``module:attribute`` of the callable that builds it; what it takes and returns is the group's contract.
        summary: one line for listings.
        configs: package whose ``*.yaml`` files are ready-made configurations (recipes), or "".
    """

    interface: int
    config: str
    factory: str
    summary: str = ""
    configs: str = ""

    def config_class(self) -> type[Config]:
        """Import the configuration model.

        Raises:
            PluginError: it cannot be imported, or is no `Config`.
        """
        from rlcore.config.base import Config

        model = _import(self.config, "configuration")
        if not (isinstance(model, type) and issubclass(model, Config)):
            raise PluginError(f"configuration {self.config} is not a subclass of rlcore.config.Config")
        return model

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Import the factory and call it.

        Raises:
            PluginError: the factory cannot be imported, for example because the backend's own package is missing.
        """
        return self.import_factory()(*args, **kwargs)

    def import_factory(self) -> Callable[..., Any]:
        """Import the factory.

        Raises:
            PluginError: it cannot be imported or called.
        """
        factory = _import(self.factory, "factory")
        if not callable(factory):
            raise PluginError(f"factory {self.factory} cannot be called: it is of type {type(factory).__name__}")
        return factory  # type: ignore[no-any-return]

    def ready_made(self) -> dict[str, Path]:
        """Ready-made configurations by name.

        Raises:
            PluginError: their package cannot be imported.
        """
        if not self.configs:
            return {}
        try:
            folder = files(self.configs)
        except Exception as error:
            raise PluginError(f"configurations {self.configs} cannot be found: {reason(error)}") from error
        found = {path.name.removesuffix(".yaml"): Path(str(path)) for path in folder.iterdir()}
        return {name: path for name, path in sorted(found.items()) if path.suffix == ".yaml"}


@dataclass(frozen=True)
class Installed:
    """One entry point, for listings.

    Attributes:
        distribution: name and version of the package that offers it.
        plugin: None where ``problem`` says why it is not usable (or where the group's members are no plugins).
        missing: optional packages that it needs with the defaults of its settings, and that are not installed.
    """

    group: str
    name: str
    distribution: str
    plugin: Plugin | None = None
    problem: str = ""
    missing: tuple[Package, ...] = ()


def resolve(path: str) -> Any:
    """The object at ``module:attribute``."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def names(group: str) -> list[str]:
    """Names in ``group``, usable or not."""
    return sorted(_points(group))


def get(group: str, name: str) -> Plugin:
    """The plugin ``name`` of ``group``.

    Raises:
        PluginError: unknown (with close matches and, for ours, what to install), offered by several packages, not
            importable, or written for another interface version.
    """
    kind, interface = GROUPS[group]
    point = find(group, name, kind)
    plugin = _load(point, f"{kind} {name!r}")
    if not isinstance(plugin, Plugin):
        raise PluginError(f"{kind} {name!r} ({_origin(point)}): {point.value} is not an rlcore.plugins.Plugin")
    if plugin.interface != interface:
        raise PluginError(
            f"{kind} {name!r} ({_origin(point)}) was written for interface {plugin.interface}, this rlcore speaks "
            f"{interface}; install versions of both that match"
        )
    return plugin


def find(group: str, name: str, kind: str) -> EntryPoint:
    """The entry point ``name`` of ``group``, not loaded; ``kind`` is what messages call it.

    Raises:
        PluginError: unknown, or offered by several packages.
    """
    points = _points(group)
    if name not in points:
        if is_ours(group, name):
            raise PluginError(f"{kind} {name!r} is not installed; run: pip install '{OURS[group, name]}'")
        close = get_close_matches(name, {*points, *(plugin for owner, plugin in OURS if owner == group)}, n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else f"installed: {', '.join(sorted(points)) or 'none'}"
        )
        raise PluginError(f"unknown {kind} {name!r}; {hint}")
    if len(points[name]) > 1:
        owners = " and ".join(map(_origin, points[name]))
        raise PluginError(f"{kind} {name!r} is offered by {owners}; uninstall all but one of them")
    return points[name][0]


def load_command(name: str) -> Any:
    """The click command ``name`` that another package adds to ``rlcore``.

    Raises:
        PluginError: as for `get`.
    """
    return _load(find(COMMANDS, name, "command"), f"command {name!r}")


def is_ours(group: str, name: str) -> bool:
    """Whether one of rlcore's own packages offers it, installed or not."""
    return (group, name) in OURS


def origin(group: str, name: str) -> str:
    """Name and version of the package that offers ``name``."""
    return " and ".join(map(_origin, _points(group)[name]))


def listing() -> Iterator[Installed]:
    """Every entry point of every group, with everything that it names imported: configuration, factory, backend.

    The import of a factory is left out where an optional package is missing, without which it may fail.
    """
    for group in [*GROUPS, ALGORITHMS, COMMANDS]:
        for name in names(group):
            item = Installed(group, name, origin(group, name))
            try:
                yield _checked_plugin(item) if group in GROUPS else _checked_object(item)
            except PluginError as error:
                yield replace(item, problem=str(error))


def _checked_plugin(item: Installed) -> Installed:
    from rlcore.config.requirements import missing_by_default

    plugin = get(item.group, item.name)
    with boundary(f"the defaults of {plugin.config} cannot be used", PluginError):
        missing = missing_by_default(plugin.config_class())
    plugin.ready_made()
    if not missing:
        plugin.import_factory()
    return replace(item, plugin=plugin, missing=tuple(missing))


def _checked_object(item: Installed) -> Installed:
    _load(find(item.group, item.name, "entry point"), f"entry point {item.name!r}")
    return item


@cache
def import_algorithms() -> tuple[str, ...]:
    """Import the built-in algorithms and every module under the ``rlcore.algorithms`` entry points, once.

    Returns:
        what is wrong with those that cannot be imported, of which a warning speaks too; the others work.
    """
    import_module("rlcore.algorithms")
    problems = []
    for points in _points(ALGORITHMS).values():
        for point in points:
            try:
                _load(point, f"algorithms {point.name!r}")
            except PluginError as error:
                problems.append(str(error))
                warn(str(error), RlcoreWarning, stacklevel=2)
    return tuple(problems)


def forget_installed() -> None:
    """Look for installed plugins again; for processes that install or remove packages, such as tests."""
    _points.cache_clear()
    import_algorithms.cache_clear()


@cache
def _points(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def _import(path: str, what: str) -> Any:
    try:
        return resolve(path)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{what} {path} cannot be imported: {reason(error)}") from error


def _load(point: EntryPoint, what: str) -> Any:
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{what} ({_origin(point)}) cannot be imported: {reason(error)}") from error


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
