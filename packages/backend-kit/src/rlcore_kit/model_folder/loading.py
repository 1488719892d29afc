"""Load the configuration and the model of a Hugging Face model folder, with the class that suits a head."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlcore.boundary import boundary
from rlcore.engines import ModelSettings
from rlcore.engines.settings import Head
from rlcore.errors import EngineError
from rlcore_kit.model_folder import checks, files

# Supported types of layers; all others (linear attention, convolutions, chunks) mix the sequences of a packed row.
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_SCORE = "score"
"""The scalar head's module in transformers' classes."""


def read_config(settings: ModelSettings, head: Head = "policy", new_head: bool = False, head_outputs: int = 1) -> Any:
    """Read the model's configuration and check the files that belong to it.

    Args:
        new_head: whether the files may lack a score head; see `rlcore.engines.TrainEngineSpec`.
        head_outputs: numbers per token of a value or score head, the ``num_labels`` of what is returned.

    Raises:
        EngineError: the folder is missing or incomplete, a file is damaged, or the architecture is unsupported.
    """
    folder = files.model_folder(settings)
    where = "cannot be read" if folder else "is not a local folder and cannot be fetched from the Hub"
    if folder:
        checks.check_config_file(folder)
    with boundary(f"model {settings.path!r} {where}", EngineError), quiet():
        config = AutoConfig.from_pretrained(**_source(settings))
        layers = set(getattr(config.get_text_config(), "layer_types", None) or ())
        checks.check_files(settings, config, head, folder, new_head, head_outputs)
    if head != "policy":
        config.num_labels = head_outputs
    if strange := sorted(layers - _LAYER_TYPES):
        raise EngineError(
            f"model {settings.path!r} ({config.model_type}) has {strange[0]} layers, which mix the sequences of a "
            "packed row; only full and sliding-window attention is supported"
        )
    return config


def load_model(
    settings: ModelSettings,
    config: Any,
    head: Head,
    dtype: torch.dtype | Literal["auto"],
    seed: int,
    attention: str,
    new_head: bool = False,
) -> PreTrainedModel:
    """Load the model with its weights, on the CPU, in evaluation mode.

    Args:
        config: configuration of transformers, from `read_config`.
        dtype: precision of the parameters; "auto" takes that of the files.
        seed: initialises a new head.
        attention: name of the attention implementation in transformers' attention interface.
        new_head: whether the files may lack a score head, as they may always lack a value head.

    Raises:
        EngineError: the weights cannot be loaded, or do not agree with the configuration.
    """
    with boundary(f"weights of {settings.path!r} cannot be loaded", EngineError):
        cls = _auto_class(settings, config, head)
        with quiet(), torch.random.fork_rng(devices=[]):
            model, info = cls.from_pretrained(
                **_source(settings),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # _check_loaded reports them
            )
    _check_loaded(settings, model, info, head, new_head or head == "value")
    new = {name for name in info["missing_keys"] if name.startswith(f"{_SCORE}.")}
    if f"{_SCORE}.weight" in new:
        # small, so that new values and scores start near zero
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(model.score.weight.shape, generator=generator) / (model.score.in_features + 1)
        model.score.weight.data.copy_(weight)
        checks.warn_of_new_head(settings)
    if f"{_SCORE}.bias" in new:
        model.score.bias.data.zero_()
    return _prepared(model)


def _check_loaded(
    settings: ModelSettings, model: PreTrainedModel, info: dict[str, Any], head: Head, new_head: bool
) -> None:
    """Raise `EngineError` if files and model differ in any tensor."""
    where, cls = f"weights of {settings.path!r}", type(model).__name__
    if getattr(model, "_hf_peft_config_loaded", False):  # of the Hub; a folder with an adapter is refused earlier
        raise EngineError(f"model {settings.path!r} comes with an adapter, which was loaded on top of its weights")
    if misshapen := sorted(info["mismatched_keys"]):
        name, in_file, in_model = misshapen[0]
        raise EngineError(
            f"{where} do not fit {cls} of its {files.CONFIG}: {len(misshapen)} tensors have other shapes, first "
            f"{name}, which has {list(in_file)} instead of {list(in_model)}"
        )
    missing = {name for name in info["missing_keys"] if not new_head or not name.startswith(f"{_SCORE}.")}
    if missing:
        raise EngineError(f"{where} lack {len(missing)} tensors of {cls}, first {min(missing)}")
    outputs = set() if head == "policy" else _output_names(model)
    if unknown := checks.not_ignored(set(info["unexpected_keys"]) - outputs, settings.ignored_weights):
        raise EngineError(
            f"{where} hold {len(unknown)} tensors that {cls} of its {files.CONFIG} does not take, first "
            f"{unknown[0]}; correct {files.CONFIG}, or name tensors to ignore in the model's ignored_weights"
        )
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if apart := sorted(set(tied) - set(model.all_tied_weights_keys)):
        raise EngineError(
            f"{where} hold {apart[0]} with other values than {tied[apart[0]]}, but tie_word_embeddings in its "
            f"{files.CONFIG} makes them one tensor; set tie_word_embeddings to false there"
        )


def _output_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the language-model head, which a model with a scalar head ignores."""
    causal = transformers.AutoModelForCausalLM._model_mapping.get(type(model.config), None)
    tied = getattr(causal, "_tied_weights_keys", None) or ()
    return {"lm_head.weight", "lm_head.bias", *tied}


def empty_model(
    settings: ModelSettings, config: Any, head: Head, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """Build the model without weights, on the meta device; the arguments are those of `load_model`."""
    with boundary(f"model {settings.path!r} cannot be built", EngineError), quiet(), torch.device("meta"):
        model = _auto_class(settings, config, head).from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=settings.trust_remote_code
        )
    return _prepared(model)


def _prepared(model: PreTrainedModel) -> PreTrainedModel:
    """Put ``model`` into evaluation mode, and give every token's embedding a gradient.

    transformers computes none for the padding token. A packed row has no padding: that token was sampled by the policy
    or is part of a prompt (it often is also the end of a text).
    """
    embeddings: Any = model.get_input_embeddings()
    embeddings.padding_idx = None
    model.train(False)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and its reports on missing weights, which `load_model` checks itself."""
    logger: Any = transformers_logging
    verbosity, bars = logger.get_verbosity(), logger.is_progress_bar_enabled()
    logger.set_verbosity(logging.CRITICAL)
    logger.disable_progress_bar()
    try:
        yield
    finally:
        logger.set_verbosity(verbosity)
        if bars:
            logger.enable_progress_bar()


def _auto_class(settings: ModelSettings, config: Any, head: Head) -> Any:
    """Return the auto class for ``head``."""
    cls: Any
    if head == "policy":
        cls = transformers.AutoModelForCausalLM
    else:
        biased = head == "value" or _has_bias(settings)
        cls = (
            transformers.AutoModelForTokenClassification if biased else transformers.AutoModelForSequenceClassification
        )
    remote = settings.trust_remote_code and cls.__name__ in getattr(config, "auto_map", {})
    if type(config) not in cls._model_mapping and not remote:
        raise EngineError(f"model {settings.path!r} ({config.model_type}) has no {cls.__name__} class in transformers")
    model_class = None if remote else cls._model_mapping[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    if model_class is not None and not model_class._supports_attention_backend:
        raise EngineError(f"{model_class.__name__} does not support replaceable attention in transformers")
    return cls


def _has_bias(settings: ModelSettings) -> bool:
    folder = files.model_folder(settings)
    return folder is not None and f"{_SCORE}.bias" in files.tensors(folder)


def _source(settings: ModelSettings) -> dict[str, Any]:
    path = Path(settings.path).expanduser()
    local = path.is_dir()
    return {
        "pretrained_model_name_or_path": str(path) if local else settings.path,
        "local_files_only": local,
        "trust_remote_code": settings.trust_remote_code,
    }
