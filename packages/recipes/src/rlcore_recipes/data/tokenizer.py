"""Loading a model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlcore.engines.settings import ModelSettings, names_a_folder
from rlcore.errors import DataError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(model: ModelSettings) -> Any:
    """The transformers tokenizer of ``model.tokenizer_path``, or of ``model.path``.

    Raises:
        DataError: no such folder, or one without a tokenizer.
    """
    from transformers import AutoTokenizer

    source = model.tokenizer_path or model.path
    key = "model.tokenizer_path" if model.tokenizer_path else "model.path"
    folder = Path(source).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(
            f"{key}={source} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files "
            "there or name its folder in model.tokenizer_path"
        )
    if names_a_folder(source) and not folder.is_dir():
        raise DataError(f"{key}={source}: there is no such folder")
    try:
        return AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else source, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        if folder.is_dir():
            raise DataError(f"the tokenizer in {key}={source} cannot be loaded: {reason}") from error
        raise DataError(f"{key}={source} is no folder here and cannot be loaded from the Hub: {reason}") from error
