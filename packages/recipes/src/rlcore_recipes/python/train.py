"""`rlcore.train`: from arguments to a configuration, through the recipe, to the results."""

from __future__ import annotations

import gc
import os
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rlcore import plugins
from rlcore.cli.recipes import GROUP, check_packages, configuration_file
from rlcore.config import Algorithm, Config
from rlcore.config.files import Layer, file_layers
from rlcore.config.load import validate_layers
from rlcore.config.overrides import value_layers
from rlcore.errors import ConfigError, RlcoreError
from rlcore.plugins import Plugin
from rlcore.training_run import TrainingInterrupted, TrainingRun
from rlcore_recipes.python.argument import Argument, model_argument
from rlcore_recipes.python.data_objects import data_argument
from rlcore_recipes.python.open_run import open_run
from rlcore_recipes.python.reward_objects import reward_argument
from rlcore_recipes.run.folder import CONFIG
from rlcore_recipes.run.lock import claimed
from rlcore_recipes.settings.supervised import SampleTaskConfig

INPUTS = "inputs"
"""Folder, in that of the run, of the objects that were given."""
NEEDED = {"model": ("path",), "data": ("train_files",), "reward": ("name", "path")}
"""Arguments that a recipe needs if it has a section of that name, unless a configuration sets one of these keys."""


def train(
    recipe: str,
    *,
    model: object = None,
    data: object = None,
    val_data: object = None,
    reward: object = None,
    config: object = None,
    overrides: Mapping[str, Any] | None = None,
    out_dir: str | os.PathLike[str] | None = None,
) -> TrainingRun:
    """Run ``recipe``; see `rlcore.launch.train`."""
    plugin = plugins.get(GROUP, recipe)
    kind = plugin.config_class()
    arguments = _arguments(model, data, val_data, reward)
    for name in arguments:
        section = "data" if name == "val_data" else name
        if section not in kind.model_fields:
            raise ConfigError(f"the recipe {recipe} takes no {name}=: its configuration has no section {section!r}")
    below = _config_layers(plugin, kind, config)
    given = _plain_mapping("overrides", overrides)
    if out_dir is not None:
        given["trainer.out_dir"] = os.fspath(out_dir)
    above = value_layers(kind, given, "overrides")
    _check_missing(recipe, kind, arguments, [*below, *above])
    defaults = Layer("", {"trainer": _defaults(recipe, kind, "val_data" in arguments, [*below, *above])})

    def configured(inputs: Path) -> Config:
        values = {key: value for argument in arguments.values() for key, value in argument.values(inputs).items()}
        return validate_layers(kind, [defaults, *below, *value_layers(kind, values, "arguments"), *above])

    checked = configured(Path(INPUTS))  # all problems are reported before anything is written
    check_packages(checked)
    folder: Path = checked.trainer.out_dir  # type: ignore[attr-defined]
    with _written(arguments, folder) as inputs:
        return _run(plugin, configured(inputs), folder)


def _arguments(model: Any, data: Any, val_data: Any, reward: Any) -> dict[str, Argument]:
    found = {}
    if model is not None:
        found["model"] = model_argument(model)
    if data is not None:
        found["data"] = data_argument("data", "data.train_files", data)
    if val_data is not None:
        found["val_data"] = data_argument("val_data", "data.val_files", val_data)
    if reward is not None:
        found["reward"] = reward_argument(reward)
    return found


def _config_layers(plugin: Plugin, kind: type[Config], config: object) -> list[Layer]:
    """Return the layers of ``config=``: of a file, the name of a ready-made configuration, an object or a mapping."""
    if config is None:
        return []
    if isinstance(config, (str, os.PathLike)):
        return file_layers(configuration_file(plugin, os.fspath(config)))
    if isinstance(config, Config) and not isinstance(config, kind):
        raise ConfigError(f"config= is a {type(config).__name__}, but the recipe takes a {kind.__name__}")
    return value_layers(kind, _plain_mapping("config", config), "config")


def _plain_mapping(name: str, values: object) -> dict[str, Any]:
    if values is None:
        return {}
    found = _plain(values)
    if not isinstance(found, dict):
        raise ConfigError(f"{name}= must be a dict such as {{'actor.optim.lr': 1e-6}}, not a {type(values).__name__}")
    for key in found:
        if not isinstance(key, str) or not all(key.split(".")):
            raise ConfigError(f"{name}= has the key {key!r}; keys look like 'actor.optim.lr'")
    return found


def _plain(value: Any) -> Any:
    """Return a value as a file would have it: of Python's own types."""
    if isinstance(value, Config):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Algorithm):
        return value.dump()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return value


def _check_missing(recipe: str, kind: type[Config], arguments: Mapping[str, Argument], layers: Sequence[Layer]) -> None:
    """Refuse a call without what every run needs, in the words of the call."""
    missing = [
        f"{name}= (or the key {name}.{keys[0]})"
        for name, keys in NEEDED.items()
        if name not in arguments
        and name in kind.model_fields
        and kind.model_fields[name].is_required()
        and not any(_sets(layers, name, key) for key in keys)
        and not (name == "reward" and _sets(layers, "rollout", "environment"))  # which scores its episodes
    ]
    if missing:
        raise ConfigError(f"rlcore.train({recipe!r}, …) needs {', '.join(missing)}")


def _sets(layers: Sequence[Layer], section: str, key: str) -> bool:
    """Return whether one of ``layers`` sets ``key`` of ``section``, or the section to what is none."""
    sections = (layer.values[section] for layer in layers if section in layer.values)
    return any(key in values if isinstance(values, Mapping) else True for values in sections)


def _defaults(recipe: str, kind: type[Config], validates: bool, layers: Sequence[Layer]) -> dict[str, Any]:
    """Return what the trainer's keys are from Python unless the configuration says otherwise."""
    values: dict[str, Any] = {"save_hf": True, "save_freq": 50}
    generates = "rollout" in kind.model_fields and not issubclass(kind, SampleTaskConfig)
    if generates:
        values["log_rollouts"] = 8
    if validates:
        values["test_freq"] = 10
        values |= {"log_val_generations": 8} if generates else {}
    if not _sets(layers, "trainer", "out_dir"):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "with several processes (torchrun) rlcore.train needs out_dir=: all must write to one folder"
            )
        values["out_dir"] = str(_new_folder(recipe))
    return values


def _new_folder(recipe: str) -> Path:
    name = f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, 1000))
    return next(folder for folder in (Path("runs") / name for name in names) if not os.path.lexists(folder))


@contextmanager
def _written(arguments: Mapping[str, Argument], folder: Path) -> Iterator[Path]:
    """Write the objects below ``folder``, which no other run may be using; remove them if the run does not begin.

    Every process of torchrun writes them: one may look for them before another has.
    """
    inputs = folder.resolve() / INPUTS
    began = (folder / CONFIG).exists()
    with claimed(folder):
        for argument in arguments.values():
            argument.write(inputs)
    try:
        yield inputs
    except BaseException:
        if not began and not (folder / CONFIG).exists():
            for name in [name for argument in arguments.values() for name in argument.files]:
                (inputs / name).unlink(missing_ok=True)
            with suppress(OSError):  # something else is there
                inputs.rmdir()
                folder.rmdir()
        raise


def _run(plugin: Plugin, config: Config, folder: Path) -> TrainingRun:
    """Run the recipe; nothing holds its models afterwards, whatever happened."""
    interrupted = False
    try:
        with warnings.catch_warnings():  # Python shows each text once; a second run shows its own again
            plugin.build(config)
    except SystemExit as stopped:
        interrupted = stopped.code == 128 + signal.SIGINT
        if not interrupted:
            raise
    except (RlcoreError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        traceback.clear_frames(error.__traceback__)  # a notebook keeps the last error
        raise
    finally:
        gc.collect()
    run = open_run(folder)
    if interrupted:
        steps = run.metrics.num_rows and run.metrics["step"][-1].as_py()
        how = "call rlcore.train again with" if run.checkpoints else "there is no checkpoint to continue from; see"
        raise TrainingInterrupted(f"interrupted after step {steps}; {how} out_dir={str(folder)!r}", run)
    return run
