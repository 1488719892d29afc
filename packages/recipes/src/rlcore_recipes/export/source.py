"""Find what a command names: a run, one of its checkpoints, or a model folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore import plugins
from rlcore.boundary import boundary
from rlcore.config import load_config
from rlcore.engines.settings import names_a_folder
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError, ConfigError, DataError
from rlcore.suggestions import similar_paths
from rlcore_recipes.checkpoint.manifest import STATE, RunState, decode_state
from rlcore_recipes.checkpoint.naming import CheckpointLocation, is_leftover, is_name, is_url, name_of, step_of
from rlcore_recipes.checkpoint.retention import best
from rlcore_recipes.checkpoint.storage import Storage, open_storage
from rlcore_recipes.run.folder import CHECKPOINTS, CONFIG, MODEL, read_config

MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
RECIPES = "rlcore.recipes"


@dataclass(frozen=True)
class Choice:
    """Which checkpoint of a run to take: that of ``step``, the best one, or by default the newest.

    Attributes:
        config: configuration of the run, where the checkpoint's folder does not lead to it.
    """

    step: int | None = None
    best: bool = False
    config: Path | None = None


NEWEST = Choice()


@dataclass(frozen=True)
class TrainedModel:
    """A complete checkpoint, and the configuration of its run.

    Attributes:
        files: of all roles, by path in the checkpoint.
        state: its plain values, the recipe's name among them.
    """

    location: CheckpointLocation
    files: dict[str, FileRecord]
    state: RunState
    config: Any

    @property
    def roles(self) -> list[str]:
        """The roles whose weights the checkpoint holds."""
        return sorted({name.partition("/")[0] for name in self.files if "/" in name})

    def files_of(self, role: str) -> dict[str, FileRecord]:
        """Return the files of ``role``.

        Raises:
            ConfigError: the checkpoint does not hold that role.
        """
        if role not in self.roles:
            raise ConfigError(f"{self.location.path} holds no {role!r}; it holds {', '.join(self.roles)}")
        return {name: record for name, record in self.files.items() if name.startswith(f"{role}/")}


def find_model(source: str, choice: Choice = NEWEST) -> TrainedModel | str:
    """Return the checkpoint that ``source`` (a run, a checkpoint) leads to, or the name of a model.

    Raises:
        DataError: it is neither, and no name of a model on the Hub.
        CheckpointError: see `find_checkpoint`.
    """
    path = Path(source).expanduser()
    if not is_url(source) and path.is_dir() and not _is_run(path) and not _leads_to_checkpoints(path):
        if (path / MODEL_CONFIG).is_file():
            _refuse_choice(source, choice)
            return str(path)
        if (path / ADAPTER_CONFIG).is_file():
            raise DataError(f"{source} holds an adapter alone; export its run without --adapter for a complete model")
    if not is_url(source) and not names_a_folder(source) and not os.path.lexists(path):
        _refuse_choice(source, choice)
        return source
    return find_checkpoint(source, choice)


def _refuse_choice(source: str, choice: Choice) -> None:
    if choice != NEWEST:
        raise ConfigError(f"{source} is a model and has no checkpoints: leave out the options that choose one")


def find_checkpoint(source: str, choice: Choice = NEWEST) -> TrainedModel:
    """Return the checkpoint that ``source`` (a run's folder, that of its checkpoints, or a checkpoint) leads to.

    Nothing is changed: the run may be under way.

    Raises:
        DataError: ``source`` is none of these.
        CheckpointError: the checkpoint is unfinished or damaged, or there is none of that step.
        ConfigError: the run's configuration cannot be found or read.
    """
    location = CheckpointLocation.of(source)
    if is_name(location.name):
        if choice.step is not None or choice.best:
            raise ConfigError(f"{source} is one checkpoint: give its run to choose another one")
        return _opened(open_storage(location.root), location, _config_file(location.root, choice))
    if is_leftover(location.name):
        raise CheckpointError(f"{source} is an unfinished checkpoint{_finished(location.root)}")
    if is_url(source):
        root, file = location.path, _config_file(location.path, choice)
    else:
        path = Path(location.path)
        _check_folder(path, source)
        root = _root_of(path)
        file = choice.config or (path / CONFIG if _is_run(path) else _config_file(root, choice))
    storage = open_storage(root)
    return _opened(storage, CheckpointLocation(root, _chosen(storage, root, choice, file)), file)


def _check_folder(path: Path, source: str) -> None:
    expected = f"a run ({CONFIG}), a checkpoint (step-N) or a folder of checkpoints"
    if not path.is_dir():
        raise DataError(f"{source}: there is no such folder{similar_paths(path)}; expected {expected}")
    if not _is_run(path) and not _leads_to_checkpoints(path):
        what = "a model folder" if (path / MODEL_CONFIG).is_file() else "none of these"
        raise DataError(f"{source} is {what}; expected {expected}{_nearest(path)}")


def _is_run(path: Path) -> bool:
    return (path / CONFIG).is_file()


def _leads_to_checkpoints(path: Path) -> bool:
    return is_name(path.name) or any(is_name(entry) for entry in os.listdir(path))


def _nearest(path: Path) -> str:
    """Return a hint at a checkpoint or run next to ``path``: in it, or above it."""
    above = [folder for folder in list(path.parents)[:3] if is_name(folder.name) or _is_run(folder)]
    below = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and _is_run(entry)]
    found = [*above, *below][:1]
    return f"; did you mean {found[0]}?" if found else ""


def _root_of(path: Path) -> str:
    """Return where the checkpoints of the run in ``path`` are, as its configuration says."""
    if not _is_run(path):
        return str(path)
    named = _trainer(path / CONFIG).get("checkpoint_dir")
    return CheckpointLocation.of(f"{named}/x").root if named else str(path / CHECKPOINTS)


def _trainer(file: Path) -> dict[str, Any]:
    """Return the section ``trainer`` of a run's configuration, before its recipe is known."""
    with boundary(f"{file} cannot be read", ConfigError):
        return dict(read_config(file)["trainer"])


def _config_file(root: str, choice: Choice) -> Path:
    """Return the configuration of the run whose checkpoints are below ``root``."""
    if choice.config is not None:
        return choice.config
    if not is_url(root) and (found := Path(root).parent / CONFIG).is_file():
        return found
    raise ConfigError(
        f"nothing leads from {root} to the configuration of its run: name the run's folder, or give its {CONFIG} by "
        "--run-config"
    )


def _chosen(storage: Storage, root: str, choice: Choice, file: Path) -> str:
    """Return the name of the checkpoint."""
    names = storage.names()
    if not names:
        model = Path(root).parent / MODEL
        hint = f"; its final model is in {model}" if not is_url(root) and model.is_dir() else ""
        raise CheckpointError(f"there are no checkpoints in {root} (trainer.save_freq writes them){hint}")
    if choice.step is not None:
        name = name_of(choice.step)
        if name not in names:
            nearest = min(names, key=lambda one: abs(step_of(one) - (choice.step or 0)))
            raise CheckpointError(f"{root} has no checkpoint of step {choice.step}; the nearest is {nearest}")
        return name
    if choice.best:
        return name_of(_best(storage, root, file))
    finished = [name for name in names if _has_manifest(storage, name)]
    if not finished:
        raise CheckpointError(f"no checkpoint in {root} is finished ({', '.join(names)} have no manifest)")
    return finished[-1]


def _best(storage: Storage, root: str, file: Path) -> int:
    trainer = _trainer(file)
    metric, sign = trainer.get("best_metric"), -1 if trainer.get("best_mode") == "min" else 1
    scores = {
        step_of(name): sign * storage.manifest(name).metrics[metric]
        for name in storage.names()
        if _has_manifest(storage, name) and metric in storage.manifest(name).metrics
    }
    step = best(scores)
    if step is None:
        raise CheckpointError(
            f"no checkpoint in {root} has a metric to choose the best one by: the run had trainer.best_metric={metric}"
        )
    return step


def _has_manifest(storage: Storage, name: str) -> bool:
    try:
        storage.manifest(name)
    except CheckpointError:
        return False
    return True


def _finished(root: str) -> str:
    """Return a hint at the newest finished checkpoint below ``root``."""
    storage = open_storage(root)
    names = [name for name in storage.names() if _has_manifest(storage, name)]
    return f"; the newest finished one is {root}/{names[-1]}" if names else ""


def _opened(storage: Storage, location: CheckpointLocation, file: Path) -> TrainedModel:
    storage.check(location.name)
    manifest = storage.manifest(location.name)
    state = decode_state(storage.read(location.name, STATE), manifest, {}, location.path)
    config = load_config(plugins.get(RECIPES, state.recipe).config_class(), file)
    return TrainedModel(location, manifest.files, state, config)
