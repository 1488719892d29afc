"""Cheap checks before anything is loaded: folders of models, files of data, and whether the Hub can be reached."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from warnings import warn

from rlcore.boundary import boundary
from rlcore.config import Config
from rlcore.engines import ModelSettings
from rlcore.engines.settings import names_a_folder
from rlcore.errors import DataError, RlcoreWarning
from rlcore.suggestions import similar_paths
from rlcore_recipes.data.files import HUB, existing_file
from rlcore_recipes.processes import is_main

CONNECT_S = 5.0
"""Longest wait for a connection to the Hub, name resolution included."""


def check_sources(config: Config, files: Iterable[str]) -> None:
    """Look for the folders of all models in ``config`` and for ``files``; where one is on the Hub, for that.

    Libraries retry for a minute before they say that there is no network. If one attempt to connect fails, they are
    told to use their local cache alone, so that what is not there fails immediately.

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
        _go_offline_without_network(remote)


def model_sources(config: Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every model and tokenizer that ``config`` names, with its key."""
    for name, value in config:
        key = f"{prefix}{name}"
        if isinstance(value, ModelSettings):
            yield f"{key}.path", value.path
            if value.tokenizer_path is not None:
                yield f"{key}.tokenizer_path", value.tokenizer_path
        elif isinstance(value, Config):
            yield from model_sources(value, f"{key}.")


def _go_offline_without_network(names: Iterable[str]) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    problem = _connection_problem(constants.ENDPOINT)
    if problem is None:
        return
    if is_main():
        warn(
            f"the Hugging Face Hub ({constants.ENDPOINT}) cannot be reached ({problem}); {', '.join(names)} can only "
            "be read from the local cache",
            RlcoreWarning,
            stacklevel=3,
        )
    constants.HF_HUB_OFFLINE = True  # here
    os.environ["HF_HUB_OFFLINE"] = "1"  # and in processes that are started


def _connection_problem(url: str) -> str | None:
    """Why there is no answer from ``url``; None if there is one."""
    from huggingface_hub.utils import get_session

    found: list[Any] = []

    def connect() -> None:
        try:
            get_session().head(url, timeout=CONNECT_S)  # by the proxies and certificates that the downloads use
            found.append(None)
        except Exception as error:
            found.append(str(error).strip().partition("\n")[0] or type(error).__name__)

    # in a thread, because no time limit covers the resolution of the host's name
    attempt = threading.Thread(target=connect, name="hub", daemon=True)
    attempt.start()
    attempt.join(CONNECT_S)
    return found[0] if found else f"no answer within {CONNECT_S:g} s"
