"""Push an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from rlcore.boundary import boundary
from rlcore.errors import ConfigError, EngineError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_repository(name: str) -> None:
    """Make sure that ``name`` can be a repository's, before anything is done.

    Raises:
        ConfigError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--push-to-hub {name}: name the repository as organisation/model")


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload the files of ``folder`` to the model repository, which is created if there is none; return its address.

    Raises:
        EngineError: the Hub cannot be reached or refuses; ``folder`` stays as it is.
    """
    import huggingface_hub
    from huggingface_hub import constants

    kept = f"the model is in {folder}, but it was not pushed to {repository}"
    if constants.HF_HUB_OFFLINE:
        raise EngineError(f"{kept}: HF_HUB_OFFLINE is set; unset it and run: hf upload {repository} {folder}")
    if huggingface_hub.get_token() is None:
        raise EngineError(f"{kept}: no account is logged in; run: hf auth login, then: hf upload {repository} {folder}")
    with boundary(kept, EngineError):
        api = huggingface_hub.HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    return str(address)
