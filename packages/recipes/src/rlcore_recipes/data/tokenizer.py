"""Loading a model's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlcore.boundary import boundary
from rlcore.engines.settings import ModelSettings, names_a_folder
from rlcore.errors import DataError
from rlcore.suggestions import similar_paths

READ_SUFFIXES = (".json", ".jinja", ".model", ".txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(model: ModelSettings) -> Any:
    """Load the transformers tokenizer of ``model.tokenizer_path``, or of ``model.path``.

    Raises:
        DataError: no such folder, or one without a tokenizer, or with one that cannot be used.
    """
    source = model.tokenizer_path or model.path
    name = f"{'model.tokenizer_path' if model.tokenizer_path else 'model.path'}={source[:200]}"
    with boundary(f"{name} cannot be read"):
        folder = Path(source).expanduser()
        local = folder.is_dir()
        if local:
            _check_files(folder, name)
        elif names_a_folder(source):
            raise DataError(f"{name}: there is no such folder{similar_paths(folder)}")
    where = f"the tokenizer in {name}" if local else f"{name} is no folder here and"
    with boundary(f"{where} cannot be loaded{'' if local else ' from the Hub'}"):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder) if local else source, trust_remote_code=model.trust_remote_code
            )
            size = tokenizer.vocab_size
        except Exception:
            if local:
                _blame(folder, name, model.trust_remote_code)
            raise
    if not size:
        raise DataError(f"{where} has an empty vocabulary; restore its files from where the model comes from")
    return tokenizer


def _blame(folder: Path, name: str, trust_remote_code: bool) -> None:
    """Raise `DataError` for the file of ``folder`` that is damaged, if one by itself is: libraries do not name it."""
    from transformers import AutoConfig

    for file in sorted(folder.glob("*.json")):
        with boundary(f"{name}: {file.name} is not JSON in UTF-8"):
            json.loads(file.read_text(encoding="utf-8"))
    if (folder / "config.json").exists():  # it names the tokenizer's class
        with boundary(f"{name}: config.json cannot be used"):
            AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)


def _check_files(folder: Path, name: str) -> None:
    """Make sure that ``folder`` has a tokenizer, in regular files: a pipe or a device may never end."""
    for file in folder.iterdir():
        # libraries pass in silence over a folder, or a link to nothing, of a name that they would read
        expected = file.suffix in READ_SUFFIXES or (file.exists() and not file.is_dir())
        if expected and not file.is_file():
            raise DataError(f"{name}: {file.name} is not a regular file, or is a broken link")
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise DataError(
            f"{name} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files there "
            "or name its folder in model.tokenizer_path"
        )
