"""The folder of a run: whose it is, what may be written there, and the configuration in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from rlcore.boundary import boundary
from rlcore.config import Config, dump_config, yaml_format
from rlcore.config.values import is_path
from rlcore.errors import ConfigError
from rlcore.regular_file import read_regular
from rlcore_kit.checkpoint import json_file
from rlcore_kit.checkpoint.json_file import Count, JsonFile
from rlcore_recipes.checkpoint.naming import CheckpointLocation, normal
from rlcore_recipes.checkpoint.storage import open_storage
from rlcore_recipes.settings.trainer import TrainerSettings
from rlcore_recipes.trackers.jsonl import METRICS, TABLES

CONFIG = "config.yaml"
PLAN = "plan.json"
CHECKPOINTS = "checkpoints"
MODEL = "model"
LOGS = "logs"
SELECTED = "selected"
FIRST_WEIGHTS = "first-weights"
OPPONENTS = "opponents"
TIMELINE = "trace.json"
RUN_FILES = (CONFIG, CHECKPOINTS, METRICS)
"""Files by which the folder of a run is recognised."""
RESULTS = (METRICS, TABLES, SELECTED)
"""Files and folders that a run which starts from its beginning again does not add to."""
_LARGEST_CONFIG = 16 << 20
"""Bytes of the configuration in a run's folder."""


class RunPlan(JsonFile):
    """What is known of a run since its start, and not written in its configuration."""

    recipe: str = Field(description="Name of the recipe.")
    total_steps: Count = Field(description="Number of steps of the run.")


def check_free(trainer: TrainerSettings, config: Config) -> None:
    """Refuse to write into a folder that holds another run, or over something else.

    With ``resume=auto`` a run without checkpoints starts from its beginning: under the configuration it had, as a
    scheduler that restarts killed jobs does, or under another one (see `write_config`), unless it has a model.

    Raises:
        ConfigError: the folder is taken, or is a file; or the run would write over one of its inputs, or a model that
            no run wrote.
        CheckpointError: the checkpoints' URL cannot be used.
    """
    folder, checkpoints = trainer.out_dir, open_storage(trainer.checkpoint_root)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"trainer.out_dir={folder} is a file; name a folder")
    _check_inputs(trainer, config)
    found = [name for name in RUN_FILES if os.path.lexists(folder / name)]
    if not found:
        _check_model(trainer)
    elif trainer.resume == "never":
        raise ConfigError(
            f"trainer.out_dir={folder} holds a run already ({', '.join(found)}) and trainer.resume is never; name "
            "another folder, or continue the run with trainer.resume=auto"
        )
    elif trainer.resume == "auto":
        changed = [] if checkpoints.names() else changed_keys(folder / CONFIG, config)
        if changed and (folder / MODEL).exists():
            raise ConfigError(
                f"trainer.out_dir={folder} holds another run that is complete, with a model but without checkpoints "
                f"(its settings differ: {', '.join(changed[:5])}); name another folder"
            )
    elif not (
        Path(trainer.resume).resolve().is_relative_to(folder.resolve())
        or CheckpointLocation.of(trainer.resume).root == normal(trainer.checkpoint_root)
    ):
        raise ConfigError(
            f"trainer.out_dir={folder} holds a run already ({', '.join(found)}), and trainer.resume={trainer.resume} "
            "is of another; name another folder, or continue the run that is there with trainer.resume=auto"
        )


def _check_inputs(trainer: TrainerSettings, config: Config) -> None:
    """Refuse to write over what the run reads."""
    folder = trainer.out_dir.resolve()
    written = dict.fromkeys((CONFIG, *RESULTS), "")
    if trainer.save_hf:
        written[MODEL] = " with trainer.save_hf"
    for key, path in _paths(config):
        for name, why in written.items():
            if os.path.exists(path) and Path(path).resolve().is_relative_to(folder / name):
                raise ConfigError(
                    f"{key}={path} is where the run would write{why} (trainer.out_dir={trainer.out_dir}); name another "
                    "trainer.out_dir"
                )


def _check_model(trainer: TrainerSettings) -> None:
    """Refuse to export over a model in a folder without a run."""
    model = trainer.out_dir / MODEL
    if trainer.save_hf and model.exists() and (not model.is_dir() or any(model.iterdir())):
        raise ConfigError(
            f"{model}, where trainer.save_hf would write, is there already and no run wrote it; move it away or name "
            "another trainer.out_dir"
        )


def _paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys of a configuration that name files or folders, except the trainer's, and their values."""
    if not isinstance(value, Config) or isinstance(value, TrainerSettings):
        return
    for name, about in type(value).model_fields.items():
        inner, path = getattr(value, name), f"{key}.{name}" if key else name
        if is_path(about.annotation, about.metadata):
            yield from ((path, str(item)) for item in (inner if isinstance(inner, (list, tuple)) else [inner]) if item)
        for item in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from _paths(item, path)


@dataclass(frozen=True)
class Replaced:
    """The result of `write_config`: how the run before differed.

    Attributes:
        changed: the keys that differ.
        kept: the folder with the files of a run that starts from its beginning again, if it moved them there.
    """

    changed: list[str] = field(default_factory=list)
    kept: Path | None = None


def write_config(folder: Path, config: Config, step: int) -> Replaced:
    """Write the resolved configuration, and keep one that differs.

    It is renamed after the step at which it ended. If the run starts from its beginning and has metrics, these and the
    configuration go to a folder ``attempt-1`` (2, 3 …).

    Raises:
        ConfigError: the folder cannot be written to.
    """
    path, temporary, kept = folder / CONFIG, folder / f"{CONFIG}.tmp", None
    with boundary(f"trainer.out_dir={folder} cannot be written to", ConfigError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(dump_config(config), encoding="utf-8")
        changed = changed_keys(path, config)
        if changed and not step and any(os.path.lexists(folder / name) for name in RESULTS):
            kept = _new_attempt(folder)
            for name in (CONFIG, *RESULTS):
                if os.path.lexists(folder / name):
                    os.rename(folder / name, kept / name)
        elif changed:
            path.rename(folder / f"config-until-step-{step}.yaml")
        temporary.rename(path)
    return Replaced(changed, kept)


def write_plan(folder: Path, plan: RunPlan) -> None:
    """Write what `read_plan` reads.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    with boundary(f"trainer.out_dir={folder} cannot be written to", ConfigError):
        temporary = folder / f"{PLAN}.tmp"
        temporary.write_bytes(plan.encoded(indent=1))
        temporary.rename(folder / PLAN)


def read_plan(folder: Path) -> RunPlan | None:
    """Return the plan of the run in ``folder``; None if it did not get that far.

    Raises:
        CheckpointError: the file is damaged.
    """
    return json_file.read(folder / PLAN, RunPlan) if os.path.lexists(folder / PLAN) else None


def _new_attempt(folder: Path) -> Path:
    number = 1
    while os.path.lexists(attempt := folder / f"attempt-{number}"):
        number += 1
    attempt.mkdir()
    return attempt


def read_config(file: Path) -> Any:
    """Return the values in a run's configuration, before its recipe is known."""
    values, _ = yaml_format.parse(read_regular(file, _LARGEST_CONFIG).decode("utf-8"), str(file))
    return values


def changed_keys(path: Path, config: Config) -> list[str]:
    """Dotted keys whose values in the file ``path`` are not those of ``config``; none without a file.

    How a run is continued is no property of the run: ``trainer.resume`` may change. A file that cannot be read counts
    as one change.
    """
    if not os.path.lexists(path):
        return []
    try:
        with boundary(f"{path} cannot be read", ConfigError):
            before = read_config(path)
    except ConfigError as error:
        return [f"all of {CONFIG}, as {error}"]
    after, _ = yaml_format.parse(dump_config(config), "the configuration")
    old, new = flatten(before), flatten(after)
    keys = (old.keys() | new.keys()) - {"trainer.resume"}
    return sorted(key for key in keys if old.get(key) != new.get(key))


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    return {key: value for name in values for key, value in flatten(values[name], f"{prefix}{name}.").items()}
