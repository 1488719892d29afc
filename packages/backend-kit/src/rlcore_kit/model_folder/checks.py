"""Checks of a model folder before anything is computed: do its files agree, and do they suit the engine?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from warnings import warn

from rlcore.engines.settings import Head, ModelSettings
from rlcore.errors import EngineError, RlcoreWarning
from rlcore_kit.model_folder.files import CONFIG, Tensor, end_tokens, read_json, tensors

MAX_LABELS = 100_000

_INTEGER_TYPES = frozenset({"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "max_position_embeddings",
)


def check_config_file(folder: Path) -> None:
    """Raise `EngineError` if ``config.json`` cannot be read, or would make transformers build endless lists."""
    labels = read_json(folder / CONFIG).get("num_labels")
    if isinstance(labels, int) and labels > MAX_LABELS:
        raise EngineError(f"{folder / CONFIG}: num_labels is {labels!r:.100}, more than the maximum of {MAX_LABELS}")


def check_files(
    settings: ModelSettings,
    config: Any,
    head: Head,
    folder: Path | None,
    new_head: bool = False,
    head_outputs: int = 1,
) -> None:
    """Compare the model's files with its configuration and with ``head``.

    Args:
        config: configuration of transformers.
        folder: folder of the files; None if they have not been fetched yet.
        new_head: whether the files may lack a score head.
        head_outputs: numbers per token that a value or score head gives.

    Raises:
        EngineError: two of them contradict each other; the message names both.
    """
    check_unquantised(settings, config)
    found = tensors(folder) if folder else {}
    check_sizes(settings, config, found)
    if folder:
        check_tensors(settings, found, head, new_head, head_outputs)
    if head == "policy":
        end_tokens(settings, int(config.get_text_config().vocab_size))


def check_unquantised(settings: ModelSettings, config: Any) -> None:
    """Raise `EngineError` if the configuration (of transformers) declares quantised weights."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    named = quantised if isinstance(quantised, dict) else vars(quantised)
    method = getattr(named.get("quant_method"), "value", named.get("quant_method")) or "an unnamed method"
    raise EngineError(
        f"model {settings.path!r} has quantised weights ({method}), with which no training engine computes; take the "
        "model's unquantised weights"
    )


def check_sizes(settings: ModelSettings, config: Any, found: dict[str, Tensor]) -> None:
    """Raise `EngineError` if a size in the configuration (of transformers) is invalid or larger than any tensor.

    Such a model could allocate any amount of memory before its weights are compared.

    Args:
        found: tensors of the files; empty if they have not been fetched yet.
    """
    widest = max((max(tensor.shape, default=0) for tensor in found.values()), default=0)
    for name in _SIZES:
        value = getattr(config.get_text_config(), name, None)
        if value is None or isinstance(value, list | tuple):  # one size for each layer
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EngineError(f"model {settings.path!r}: {name} in {CONFIG} is {value!r:.100}, not a positive integer")
        maximum = len(found) if name == "num_hidden_layers" else widest
        if found and value > maximum and name != "max_position_embeddings":
            raise EngineError(
                f"model {settings.path!r}: {name} in {CONFIG} is {value!r:.100}, but the weights have "
                + (f"{maximum} tensors" if name == "num_hidden_layers" else f"no dimension larger than {maximum}")
            )


def check_tensors(
    settings: ModelSettings, found: dict[str, Tensor], head: Head, new_head: bool = False, head_outputs: int = 1
) -> None:
    """Raise `EngineError` if the files hold integers as weights, or a head that does not suit ``head``.

    Args:
        head: "policy", "value" or "score". A score head must be in the files unless ``new_head`` says that it may start
            with new weights, as a value head always may.
        head_outputs: rows that the head must have.
    """
    where = f"weights of {settings.path!r}"
    floats = (".weight", ".bias")  # buffers may hold integers
    integers = [name for name, tensor in found.items() if name.endswith(floats) and tensor.dtype in _INTEGER_TYPES]
    if integers:
        raise EngineError(
            f"{where}: {integers[0]} holds integers ({found[integers[0]].dtype}) where floating-point numbers are "
            "expected; quantised weights cannot be trained"
        )
    score = found.get("score.weight")
    if head == "policy":
        if score is not None and not_ignored(["score.weight"], settings.ignored_weights):
            raise EngineError(
                f"{where} are those of a reward model or a critic (score.weight), which generates nothing; take a "
                "language model, or name score.weight in ignored_weights if there is one in these files too"
            )
        return
    if score is None and head == "score" and not new_head:
        raise EngineError(
            f"{where} have no scalar head (score.weight): a reward model needs trained weights for it, under the name "
            "that transformers' sequence classification gives them"
        )
    if score is not None and score.shape[:1] != (head_outputs,):
        wanted = "one number" if head_outputs == 1 else f"{head_outputs} numbers"
        several = "; reward_model.weights combines several" if head == "score" and head_outputs == 1 else ""
        raise EngineError(
            f"{where}: the head score.weight has shape {list(score.shape)}, which gives {score.shape[0]} labels; the "
            f"{'reward model' if head == 'score' else 'critic'} of this run gives {wanted} per token{several}"
        )


def warn_of_new_head(settings: ModelSettings) -> None:
    """Warn that the head of a critic or a reward model is new, because its files have none."""
    warn(
        f"the scalar head is new: the weights of {settings.path!r} have none (score.weight)",
        RlcoreWarning,
        stacklevel=2,
    )


def not_ignored(names: Iterable[str], ignored: Sequence[str]) -> list[str]:
    """Return the ``names`` that no pattern in ``ignored`` (`ModelSettings.ignored_weights`) matches, sorted."""
    return sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in ignored))
