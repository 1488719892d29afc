"""Reading a Hugging Face model folder: the right class for a head, and one clear sentence when something is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlcore.engines import ModelSettings
from rlcore.engines.settings import Head, model_folder
from rlcore.errors import EngineError
from rlcore_fsdp.attention import IMPLEMENTATION

# What a layer may attend to; anything else (linear attention, convolutions, chunks) crosses sequences in a packed row.
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def read_config(settings: ModelSettings) -> Any:
    """The model's configuration.

    Raises:
        EngineError: the folder is missing, has no configuration or no weights, or its architecture is unsupported.
    """
    folder = model_folder(settings)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(**_source(settings))
    except (OSError, ValueError) as error:
        where = "cannot be read" if folder else "is no folder here and cannot be fetched from the Hub"
        raise EngineError(f"model {settings.path!r} {where}: {_first_line(error)}") from error
    strange = sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()) - _LAYER_TYPES)
    if strange:
        raise EngineError(
            f"model {settings.path!r} ({config.model_type}) has {strange[0]} layers, which mix the sequences of a "
            "packed row; only full and sliding-window attention is supported"
        )
    return config


def load_model(
    settings: ModelSettings, config: Any, head: Head, dtype: torch.dtype | Literal["auto"], seed: int
) -> PreTrainedModel:
    """The model with its weights, on the CPU, in evaluation mode. New heads are initialised from ``seed``.

    ``dtype`` "auto" is that of the files.
    """
    cls = _auto_class(settings, config, head)
    with quiet(), torch.random.fork_rng(devices=[]):
        try:
            model, info = cls.from_pretrained(
                **_source(settings),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=IMPLEMENTATION,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise EngineError(f"weights of {settings.path!r} cannot be loaded: {_first_line(error)}") from error
    missing = set(info["missing_keys"])
    new = {name for name in missing if head != "policy" and name.startswith("score.")}
    if missing - new:
        raise EngineError(
            f"weights of {settings.path!r} lack {len(missing - new)} tensors of {type(model).__name__}, first "
            f"{min(missing - new)}"
        )
    if "score.weight" in new:
        # Small, so that a new critic starts near zero everywhere.
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(model.score.weight.shape, generator=generator) / (model.score.in_features + 1)
        model.score.weight.data.copy_(weight)
    if "score.bias" in new:
        model.score.bias.data.zero_()
    return _prepared(model)


def empty_model(settings: ModelSettings, config: Any, head: Head, dtype: torch.dtype) -> PreTrainedModel:
    """The model's structure on the meta device."""
    cls = _auto_class(settings, config, head)
    with quiet(), torch.device("meta"):
        model = cls.from_config(
            config, dtype=dtype, attn_implementation=IMPLEMENTATION, trust_remote_code=settings.trust_remote_code
        )
    return _prepared(model)


def _prepared(model: PreTrainedModel) -> PreTrainedModel:
    """In evaluation mode, and with a gradient for every token's embedding.

    transformers gives the padding token's none. A packed row has no padding: where that token stands, the policy
    sampled it or a prompt means it (often it is also the end of a text).
    """
    model.get_input_embeddings().padding_idx = None
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its reports on missing weights: `load_model` judges those itself."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _auto_class(settings: ModelSettings, config: Any, head: Head) -> Any:
    """The auto class for ``head``; ``config`` is set up for one scalar per token where it has no vocabulary."""
    if head == "policy":
        cls = transformers.AutoModelForCausalLM
    else:
        biased = head == "value" or _has_tensor(settings, "score.bias")
        cls = (
            transformers.AutoModelForTokenClassification if biased else transformers.AutoModelForSequenceClassification
        )
        config.num_labels = 1
    remote = settings.trust_remote_code and cls.__name__ in getattr(config, "auto_map", {})
    if type(config) not in cls._model_mapping and not remote:
        raise EngineError(f"model {settings.path!r} ({config.model_type}) has no {cls.__name__} class in transformers")
    model_class = None if remote else cls._model_mapping[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    if model_class is not None and not model_class._supports_attention_backend:
        raise EngineError(f"{model_class.__name__} does not support replaceable attention in transformers")
    return cls


def _has_tensor(settings: ModelSettings, name: str) -> bool:
    for file in Path(settings.path).expanduser().glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    return True
        except SafetensorError as error:
            raise EngineError(f"{file} is damaged: {error}") from error
    return False


def _source(settings: ModelSettings) -> dict[str, Any]:
    path = Path(settings.path).expanduser()
    local = path.is_dir()
    return {
        "pretrained_model_name_or_path": str(path) if local else settings.path,
        "local_files_only": local,
        "trust_remote_code": settings.trust_remote_code,
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
