"""Read the files of a model folder, and check each of them, in one place for every engine.

Libraries are more lenient: they ignore a truncated ``generation_config.json``, load an adapter that is in the same
folder as complete weights, and accept any number as end token.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rlcore.boundary import boundary
from rlcore.engines.settings import Head, ModelSettings, names_a_folder
from rlcore.errors import EngineError
from rlcore.suggestions import similar_paths

CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_JSON_BYTES = 256 << 20
"""Maximum size of a JSON file; indices of the largest models take a few MiB."""

_FLOAT_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a weight file, as the file's header describes it; ``dtype`` is safetensors' name ("BF16")."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EndTokens:
    """The ids that end a completion, and the file that names them (None if no file does)."""

    ids: tuple[int, ...]
    source: str | None


def model_folder(settings: ModelSettings) -> Path | None:
    """Return the model's folder; None if ``settings.path`` is a name on the Hugging Face Hub.

    Raises:
        EngineError: the folder is missing, has no configuration or no weights, or holds an adapter.
    """
    path = Path(settings.path).expanduser()
    if not path.is_dir():
        if names_a_folder(settings.path):
            raise EngineError(f"model folder {path} does not exist{similar_paths(path)}")
        return None
    complete = (path / SINGLE).is_file() or (path / INDEX).is_file()
    if (path / ADAPTER).is_file():
        if complete:
            raise EngineError(
                f"model folder {path} holds complete weights and an adapter ({ADAPTER}), so the model is ambiguous; "
                f"remove {ADAPTER} and its weights, or merge the adapter"
            )
        raise EngineError(
            f"model folder {path} holds an adapter ({ADAPTER}) and no complete weights; merge the adapter into its "
            "base model and give the merged folder"
        )
    if not (path / CONFIG).is_file():
        raise EngineError(f"model folder {path} has no {CONFIG}")
    if not complete:
        raise EngineError(f"model folder {path} has no weights ({SINGLE}, or {INDEX} and its files)")
    return path


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in ``file``.

    Raises:
        EngineError: the file is missing, not a regular file, too large, or holds no JSON object.
    """
    with boundary(f"{file} is damaged", EngineError):
        if not file.is_file():
            raise EngineError(f"{file} is not a regular file")
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise EngineError(f"{file} has {size} bytes, more than the maximum of {MAX_JSON_BYTES} for a JSON file")
        found = json.loads(file.read_text(encoding="utf-8"), parse_constant=_constant)
    if not isinstance(found, dict):
        raise EngineError(f"{file} holds a JSON {type(found).__name__} where an object is expected")
    return found


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is not a valid number")
    return float(text)


def optional_file(settings: ModelSettings, name: str) -> Path | None:
    """Return the path of the model's file ``name``, fetched from the Hub if necessary; None if it does not exist."""
    folder = Path(settings.path).expanduser()
    if folder.is_dir():
        return folder / name if os.path.lexists(folder / name) else None  # a broken link is a damaged file
    from transformers.utils.hub import cached_file

    with boundary(f"{name} of the model {settings.path!r} cannot be fetched", EngineError):
        found = cached_file(settings.path, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


# --- end tokens ------------------------------------------------------------------------------------------------------


def end_tokens(settings: ModelSettings, vocabulary: int) -> EndTokens:
    """Return the model's end tokens: those of ``generation_config.json`` if it names any, else of ``config.json``.

    Args:
        vocabulary: number of tokens of the model.

    Raises:
        EngineError: a file is damaged, or names a value that is not a token of the model.
    """
    found = EndTokens((), None)
    for name in (CONFIG, GENERATION):  # both are checked; the second has priority
        file = optional_file(settings, name)
        if file is None:
            continue
        content = read_json(file)
        text = content.get("text_config")
        if "eos_token_id" not in content and isinstance(text, dict):
            content = text
        if (value := content.get("eos_token_id")) is not None:
            found = EndTokens(_token_ids(file, value, vocabulary), name)
    return found


def _token_ids(file: Path, value: Any, vocabulary: int) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    wrong = [one for one in ids if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < vocabulary]
    if wrong or not ids:
        raise EngineError(
            f"{file}: eos_token_id is {value!r:.100}, but it must be a token of the model (0 to {vocabulary - 1}) or a "
            "list of such tokens; completions would never end"
        )
    return tuple(dict.fromkeys(ids))


# --- weights ---------------------------------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, Tensor]:
    """Read the headers of the weight files of ``folder``: of `SINGLE` if it exists, else of those that `INDEX` names.

    Raises:
        EngineError: a file is missing or damaged.
    """
    found: dict[str, Tensor] = {}
    for name in weight_files(folder):
        with boundary(f"{folder / name} is damaged", EngineError), safe_open(folder / name, "pt") as opened:
            for tensor in opened.keys():  # noqa: SIM118 (not a mapping)
                header = opened.get_slice(tensor)
                found[tensor] = Tensor(folder / name, header.get_dtype(), tuple(header.get_shape()))
    return found


def weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files of ``folder``, each of which exists.

    Raises:
        EngineError: the index is damaged, or a file is missing.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    index = folder / INDEX
    content = read_json(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise EngineError(f"{index} is not an index of weights: weight_map must give the file of every tensor")
    if not isinstance(content.get("metadata"), dict):
        raise EngineError(f'{index} has no "metadata", without which transformers cannot read it; add "metadata": {{}}')
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name:
            raise EngineError(f"{index} names {name!r}, which is not a file of its folder")
        if not (folder / name).is_file():
            raise EngineError(f"model folder {folder} has no file {name}, which {INDEX} names")
    return files


def _generation_text(settings: ModelSettings) -> str | None:
    file = optional_file(settings, GENERATION)
    if file is None:
        return None
    read_json(file)
    return file.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Origin:
    """What an exported model takes over from the files of the model that it was loaded from.

    Attributes:
        dtype: precision of most weights, by torch's name.
        dtypes: precision of the tensors, by name, that differ from ``dtype``.
        generation: text of ``generation_config.json``, which is exported unchanged: many models publish settings that
            transformers refuses to write (sampling values while sampling is off). None if there is no such file.
    """

    dtype: str
    dtypes: dict[str, str]
    generation: str | None

    @classmethod
    def of(cls, settings: ModelSettings, head: Head) -> Origin:
        """Read the files when the engine is built: they may have been deleted when the model is exported."""
        generation = _generation_text(settings) if head == "policy" else None
        if settings.export_dtype is not None:
            return cls(settings.export_dtype, {}, generation)
        config = optional_file(settings, CONFIG)
        found = tensors(config.parent) if config else {}
        known = {name: _FLOAT_TYPES[tensor.dtype] for name, tensor in found.items() if tensor.dtype in _FLOAT_TYPES}
        sizes: Counter[str] = Counter()
        for name, dtype in known.items():
            sizes[dtype] += math.prod(found[name].shape)
        main = sizes.most_common(1)[0][0] if sizes else "float32"
        return cls(main, {name: dtype for name, dtype in known.items() if dtype != main}, generation)

    def dtype_of(self, name: str) -> str:
        """Return the precision of a tensor, by torch's name."""
        return self.dtypes.get(name, self.dtype)
