"""Cheap checks before anything is loaded: folders of models, files of data, and whether the Hub can be reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from rlcore.boundary import boundary
from rlcore.config import Config
from rlcore.engines import ModelSettings
from rlcore.engines.settings import names_a_folder
from rlcore.errors import DataError
from rlcore.suggestions import similar_paths
from rlcore_recipes.data.files import HUB, existing_file
from rlcore_recipes.data.hub import go_offline_without_network
from rlcore_recipes.data.prompts import PromptDataset
from rlcore_recipes.settings import RewardRole


def check_sources(config: Config, files: Iterable[str]) -> None:
    """Look for the folders of all models in ``config`` (or of the model that it is) and for ``files``, also on the Hub.

    Raises:
        DataError: a folder or file does not exist.
    """
    remote = []
    for key, source in model_sources(config):
        with boundary(f"{key}={source[:200]} cannot be read"):
            if Path(source).expanduser().is_dir():
                continue
            if names_a_folder(source):
                raise DataError(f"{key}={source}: there is no such folder{similar_paths(Path(source).expanduser())}")
        remote.append(source)
    for file in files:
        if HUB.fullmatch(file):
            remote.append(file)
        else:
            existing_file(file)
    if remote:
        go_offline_without_network(remote)


def check_ground_truth(reward: RewardRole, *found: PromptDataset) -> None:
    """Make sure that there are reference answers, if ``reward`` cannot do without.

    Raises:
        DataError: names the file that has none.
    """
    for data in found:
        if data.without_truth is not None and getattr(reward.options, "needs_ground_truth", False):
            raise DataError(f"{data.without_truth}; the reward {reward.name} needs it")


def model_sources(config: Config, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every model and tokenizer that ``config``, at ``key``, names, with its key; alone, a model is ``model``."""
    if isinstance(config, ModelSettings):
        key = key or "model"
        yield f"{key}.path", config.path
        if config.tokenizer_path is not None:
            yield f"{key}.tokenizer_path", config.tokenizer_path
        return
    for name, value in config:
        for part, found in (value if isinstance(value, dict) else {"": value}).items():
            if isinstance(found, Config):
                yield from model_sources(found, ".".join(filter(None, (key, name, part))))
