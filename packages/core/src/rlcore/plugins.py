"""Plugins: engines, executors, rewards, recipes and trackers that installed packages offer by entry point.

Nothing is imported until its name is used. An entry point of one of the groups in `GROUPS` names a `Plugin`, which in
turn names its configuration model and its factory by import path, so that a configuration can be checked without
importing the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

from rlcore.boundary import reason
from rlcore.errors import PluginError, RlcoreWarning

if TYPE_CHECKING:
    from rlcore.config.base import Config

# group -> (what a member is called, interface version this core speaks)
GROUPS: dict[str, tuple[str, int]] = {
    "rlcore.train_engines": ("training engine", 1),
    "rlcore.rollout_engines": ("rollout engine", 1),
    "rlcore.scoring_engines": ("scoring engine", 1),
    "rlcore.environments": ("environment", 1),
    "rlcore.executors": ("executor", 1),
    "rlcore.rewards": ("reward", 1),
    "rlcore.recipes": ("recipe", 1),
    "rlcore.trackers": ("tracker", 1),
}
ALGORITHMS = "rlcore.algorithms"
COMMANDS = "rlcore.commands"
FUNCTIONS = "rlcore.functions"
"""Functions of `rlcore` itself that another package brings (`rlcore.launch`)."""

# (group, plugin of one of rlcore's packages) -> what to install, for messages about plugins that are not installed
OURS: dict[tuple[str, str], str] = {
    ("rlcore.train_engines", "fsdp"): "rlcore[fsdp]",
    ("rlcore.train_engines", "megatron"): "rlcore[megatron]",
    ("rlcore.rollout_engines", "inline"): "rlcore[fsdp]",
    ("rlcore.rollout_engines", "vllm"): "rlcore[vllm]",
    ("rlcore.rollout_engines", "sglang"): "rlcore[sglang]",
    ("rlcore.rollout_engines", "http"): "rlcore[http]",
    ("rlcore.scoring_engines", "http"): "rlcore[http]",
    **{
        ("rlcore.environments", name): "rlcore[agents]"
        for name in ("python", "command", "verifiers", "gymnasium", "textarena", "openenv", "nemo_gym")
    },
    ("rlcore.executors", "local"): "rlcore",
    ("rlcore.executors", "ray"): "rlcore[ray]",
    **{("rlcore.rewards", name): "rlcore-rewards" for name in ("gsm8k", "math", "function", "combine", "none")},
    **{("rlcore.rewards", name): "rlcore[fsdp]" for name in ("game", "environment")},
    ("rlcore.rewards", "reasoning_gym"): "rlcore-agents[reasoning-gym]",
    **{("rlcore.recipes", name): "rlcore[fsdp]" for name in ("sft", "rm", "grpo", "ppo", "dapo", "self_play")},
    **{("rlcore.trackers", name): "rlcore-recipes" for name in ("console", "jsonl", "parquet")},
    **{
        ("rlcore.trackers", name): f"rlcore-recipes[{name}]"
        for name in ("wandb", "tensorboard", "swanlab", "mlflow", "trackio")
    },
    **{(FUNCTIONS, name): "rlcore[fsdp]" for name in ("train", "open_run")},
    **{
        (COMMANDS, name): "rlcore[fsdp]"
        for name in ("quickstart", "data", "model", "plan", "eval", "export", "generate", "chat", "from-verl", "gate")
    },
}


@dataclass(frozen=True)
class Plugin:
    """What an entry point names.

    Attributes:
        interface: version of the interface the plugin was written for (`GROUPS`).
        config: ``module:attribute`` of its `Config` subclass (importable without the backend).
        factory: ``module:attribute`` of the callable that builds it; the group says what it takes and returns.
        summary: one line for listings.
        configs: package whose ``*.yaml`` files are ready-made configurations (recipes), or "".
        export: ``module:attribute`` of the function that writes a model folder from a checkpoint in a single process
            (training engines); it takes an `rlcore.engines.ExportSpec`. "": the engine is built, loads the checkpoint
            and saves the model.
    """

    interface: int
    config: str
    factory: str
    summary: str = ""
    configs: str = ""
    export: str = ""

    def config_class(self) -> type[Config]:
        """Import the configuration model.

        Raises:
            PluginError: it cannot be imported, or is not a subclass of `Config`.
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
            PluginError: it cannot be imported, or is not callable.
        """
        return _import_callable(self.factory, "factory")

    def import_export(self) -> Callable[..., None] | None:
        """Import the function of an `rlcore.engines.ExportSpec` that exports checkpoints; None if the plugin has none.

        Raises:
            PluginError: it cannot be imported, or is not callable.
        """
        return _import_callable(self.export, "export function") if self.export else None

    def ready_made(self) -> dict[str, Path]:
        """Return the files of ready-made configurations by name.

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


def resolve(path: str) -> Any:
    """Import and return the object at ``module:attribute``."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def names(group: str) -> list[str]:
    """Return the sorted names of the installed plugins of ``group``, whether they can be used or not."""
    return sorted(_points(group))


def get(group: str, name: str) -> Plugin:
    """Load the plugin ``name`` of ``group``.

    Raises:
        PluginError: unknown (with close matches and, for one of rlcore's packages, what to install), offered by
            several packages, not importable, or written for another interface version.
    """
    kind, interface = GROUPS[group]
    point = find(group, name, kind)
    plugin = _load_point(point, f"{kind} {name!r}")
    if not isinstance(plugin, Plugin):
        raise PluginError(f"{kind} {name!r} ({_origin(point)}): {point.value} is not an rlcore.plugins.Plugin")
    if plugin.interface != interface:
        raise PluginError(
            f"{kind} {name!r} ({_origin(point)}) was written for interface {plugin.interface}, but this rlcore "
            f"supports {interface}; install versions of both that match"
        )
    return plugin


def find(group: str, name: str, kind: str) -> EntryPoint:
    """Return the entry point ``name`` of ``group`` without loading it.

    Args:
        kind: what error messages call a member of the group, such as "training engine".

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


def load(group: str, name: str, kind: str) -> Any:
    """Import and return the object that the entry point ``name`` of ``group`` names, whatever it is.

    Raises:
        PluginError: as for `find`, or it cannot be imported.
    """
    return _load_point(find(group, name, kind), f"{kind} {name!r}")


def is_ours(group: str, name: str) -> bool:
    """Return whether one of rlcore's packages offers the plugin ``name``, installed or not."""
    return (group, name) in OURS


def origin(group: str, name: str) -> str:
    """Return name and version of the package that offers ``name``."""
    return " and ".join(map(_origin, _points(group)[name]))


@cache
def import_algorithms() -> tuple[str, ...]:
    """Import every module under the ``rlcore.algorithms`` entry points, once. The built-in algorithms are one of them.

    Returns:
        a sentence for each module that cannot be imported, which is also a warning; the others work.
    """
    problems = []
    for points in _points(ALGORITHMS).values():
        for point in points:
            try:
                _load_point(point, f"algorithms {point.name!r}")
            except PluginError as error:
                problems.append(str(error))
                warn(str(error), RlcoreWarning, stacklevel=2)
    return tuple(problems)


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


def _import_callable(path: str, what: str) -> Callable[..., Any]:
    found = _import(path, what)
    if not callable(found):
        raise PluginError(f"{what} {path} is not callable: it is of type {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _load_point(point: EntryPoint, what: str) -> Any:
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{what} ({_origin(point)}) cannot be imported: {reason(error)}") from error


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
