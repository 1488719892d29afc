"""The folder of a run: whose it is, and the configuration in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rlcore.config import Config, dump_config
from rlcore.errors import ConfigError
from rlcore_recipes.checkpoint.naming import Place, normal
from rlcore_recipes.checkpoint.storage import open_storage
from rlcore_recipes.settings.trainer import TrainerSettings

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
MODEL = "model"
LOGS = "logs"
TRACE = "trace.json"
TRACES = (CONFIG, CHECKPOINTS, "metrics.jsonl")  # what a run leaves behind


def check_free(trainer: TrainerSettings, config: Config) -> None:
    """Refuse to write into a folder that holds another run.

    With ``resume=auto`` a run without checkpoints may be started anew under the configuration it had, as a scheduler
    that restarts killed jobs does.

    Raises:
        ConfigError: the folder is taken, or is a file.
        CheckpointError: the checkpoints' URL cannot be used.
    """
    folder, checkpoints = trainer.out_dir, open_storage(trainer.checkpoint_root)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"trainer.out_dir={folder} is a file; name a folder")
    traces = [name for name in TRACES if (folder / name).exists()]
    if not traces or (traces == [CONFIG] and trainer.resume == "auto"):  # a run that failed before its first step
        return
    if trainer.resume == "never":
        raise ConfigError(
            f"trainer.out_dir={folder} holds a run already ({', '.join(traces)}) and trainer.resume is never; name "
            "another folder, or continue the run with trainer.resume=auto"
        )
    if trainer.resume == "auto":
        changed = [] if checkpoints.names() else changed_keys(folder / CONFIG, config)
        if changed:
            raise ConfigError(
                f"trainer.out_dir={folder} holds another run, without checkpoints ({', '.join(changed[:5])} differ); "
                "name another folder"
            )
    elif not (
        Path(trainer.resume).resolve().is_relative_to(folder.resolve())
        or Place.of(trainer.resume).root == normal(trainer.checkpoint_root)
    ):
        raise ConfigError(
            f"trainer.out_dir={folder} holds a run already ({', '.join(traces)}), and trainer.resume={trainer.resume} "
            "is of another; name another folder, or continue the run that is there with trainer.resume=auto"
        )


def write_config(folder: Path, config: Config, step: int) -> list[str]:
    """Write the resolved configuration; one that differs stays beside it under the step at which it ended.

    Returns:
        the keys that changed since.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    path, temporary = folder / CONFIG, folder / f"{CONFIG}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(dump_config(config), encoding="utf-8")
        changed = changed_keys(path, config)
        if changed:
            path.rename(folder / f"config-until-step-{step}.yaml")
        temporary.rename(path)
    except OSError as error:
        raise ConfigError(f"trainer.out_dir={folder} cannot be written to: {error}") from error
    return changed


def changed_keys(path: Path, config: Config) -> list[str]:
    """Dotted keys whose values in the file ``path`` are not those of ``config``; none without a file.

    How a run is continued is no property of the run: ``trainer.resume`` may change.
    """
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; move it away") from error
    old, new = flatten(before), flatten(yaml.safe_load(dump_config(config)))
    keys = (old.keys() | new.keys()) - {"trainer.resume"}
    return sorted(key for key in keys if old.get(key) != new.get(key))


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    return {key: value for name in values for key, value in flatten(values[name], f"{prefix}{name}.").items()}
