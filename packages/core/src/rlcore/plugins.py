"""Plugins: backends, rewards, recipes and trackers that installed packages offer by entry point.

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
from typing import Any

from rlcore.config.base import Config
from rlcore.errors import PluginError

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
    **{("rlcore.recipes", name): "rlcore-recipes" for name in ("sft", "grpo", "ppo", "dapo")},
    **{("rlcore.trackers", name): "rlcore-recipes" for name in ("console", "jsonl", "wandb", "tensorboard")},
}


@dataclass(frozen=True)
class Plugin:
    """What an entry point names.

    Attributes:
        interface: version of the interface the plugin was written for (`GROUPS`).
        config: ``module:attribute`` of its `Config` subclass (importable without the backend).
        factory: ``module:attribute`` of the callable that builds it; what it takes and returns is the group's contract.
        summary: one line for listings.
    """

    interface: int
    config: str
    factory: str
    summary: str = ""

    def config_class(self) -> type[Config]:
        return resolve(self.config)  # type: ignore[no-any-return]

    def build(self, *args: Any, **kwargs: Any) -> Any:
        factory: Callable[..., Any] = resolve(self.factory)
        return factory(*args, **kwargs)


def resolve(path: str) -> Any:
    """The object at ``module:attribute``."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def names(group: str) -> list[str]:
    return sorted(_points(group))


def get(group: str, name: str) -> Plugin:
    """The plugin ``name`` of ``group``.

    Raises:
        PluginError: unknown (with close matches and, for ours, what to install), not importable, or written for
            another interface version.
    """
    kind, interface = GROUPS[group]
    points = _points(group)
    if name not in points:
        if (group, name) in OURS:
            raise PluginError(f"{kind} {name!r} is not installed; run: pip install '{OURS[group, name]}'")
        known = set(points) | {plugin for owner, plugin in OURS if owner == group}
        close = get_close_matches(name, known, n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?" if close else f"installed: {', '.join(points) or 'none'}"
        )
        raise PluginError(f"unknown {kind} {name!r}; {hint}")
    point = points[name]
    try:
        plugin = point.load()
    except Exception as error:
        raise PluginError(
            f"{kind} {name!r} ({_origin(point)}) cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(plugin, Plugin):
        raise PluginError(f"{kind} {name!r} ({_origin(point)}): {point.value} is not an rlcore.plugins.Plugin")
    if plugin.interface != interface:
        raise PluginError(
            f"{kind} {name!r} ({_origin(point)}) was written for interface {plugin.interface}, this rlcore speaks "
            f"{interface}; install versions of both that match"
        )
    return plugin


@cache
def import_algorithms() -> None:
    """Import the built-in algorithms and every module under the ``rlcore.algorithms`` entry points, once."""
    import_module("rlcore.algorithms")
    for point in _points(ALGORITHMS).values():
        try:
            point.load()
        except Exception as error:
            raise PluginError(
                f"algorithms of {_origin(point)} cannot be imported: {type(error).__name__}: {error}"
            ) from error


def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
