"""Which chat format a model has: a hand-written renderer, or its own chat template."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from rlcore.boundary import boundary, reason
from rlcore.engines.episode import EpisodeSpec
from rlcore.errors import ConfigError, DataError
from rlcore_agents.conversation.chat_format import ChatFormat
from rlcore_agents.conversation.handwritten import HandWrittenFormat
from rlcore_agents.conversation.template import TemplateFormat
from rlcore_agents.conversation.text_tokens import SplittingTokenizer
from rlcore_kit.model_folder.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

PROBE = [{"role": "user", "content": "probe question"}]
_formats: dict[str, ChatFormat] = {}


def chat_format(spec: EpisodeSpec) -> ChatFormat:
    """Return the chat format of the model of ``spec``, the same object for the same model in one process.

    The first call says on standard error which one it is.
    The environment's setting ``renderer`` selects it (see `ConversationSettings`).

    Raises:
        ConfigError: the renderer is unknown or does not fit the model, or the model has no chat template.
        DataError: the chat template is broken.
    """
    renderer = getattr(spec.options, "renderer", "auto")
    ends = sorted(spec.end_tokens)
    key = json.dumps(
        [spec.model.model_dump(mode="json"), renderer, spec.chat_template, dict(spec.chat_template_kwargs), ends],
        default=repr,
    )
    if key not in _formats:
        tokenizer = load_tokenizer(spec.model)
        _formats[key] = format_for(
            tokenizer, renderer, spec.model.path, spec.chat_template, spec.chat_template_kwargs, ends
        )
        if os.environ.get("RANK", "0") == "0":  # one line under torchrun
            print(f"conversations are rendered with {_formats[key].name}", file=sys.stderr)
    return _formats[key]


def format_for(
    tokenizer: Any,
    renderer: str = "auto",
    model: str = "",
    chat_template: str | None = None,
    variables: Mapping[str, Any] | None = None,
    end_tokens: Iterable[int] = (),
) -> ChatFormat:
    """Return the chat format of a tokenizer; arguments as in `EpisodeSpec`.

    Args:
        model: its name; "auto" takes a hand-written renderer for exactly the names that ``renderers`` knows, if it
            writes a question as the chat template does.
    """
    tokenizer = copy.copy(tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    splitting = SplittingTokenizer(tokenizer)
    variables = dict(variables or {})
    name = _known_name(model) if renderer == "auto" and chat_template is None else renderer
    if name not in ("auto", "template"):
        try:
            return _handwritten(splitting, name, variables)
        except ConfigError as error:
            if renderer != "auto":
                raise
            logger.warning("%s; the model's chat template is used", error)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {model or 'the model'} has no chat template; use a chat model, or name "
            "a hand-written renderer in the environment's setting renderer"
        )
    with boundary("the chat template cannot be used for conversations", ConfigError):
        return TemplateFormat(splitting, variables, tuple(end_tokens))


def _known_name(model: str) -> str:
    from renderers.base import MODEL_RENDERER_MAP

    return str(MODEL_RENDERER_MAP.get(model, "template"))


def renderer_names() -> list[str]:
    """Return the names of the hand-written renderers."""
    from renderers import RendererConfig

    union, *_ = get_args(RendererConfig)
    names = {str(config.model_fields["name"].default) for config in get_args(union)}
    return sorted(names - {"auto", "default", "custom"})


def _handwritten(tokenizer: SplittingTokenizer, name: str, variables: Mapping[str, Any]) -> HandWrittenFormat:
    """Return the hand-written renderer ``name``, after a comparison of its prompts with the chat template's."""
    from renderers import config_from_name, create_renderer

    names = renderer_names()
    if name not in names:
        close = get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ";"
        raise ConfigError(f"there is no renderer {name!r}{hint} known are auto, template, {', '.join(names)}")
    try:
        renderer = create_renderer(tokenizer, config_from_name(name), chat_template_kwargs=variables)
        written = list(renderer.render_ids(PROBE, add_generation_prompt=True))
    except Exception as error:
        raise ConfigError(
            f"the hand-written renderer {name} does not fit the model's tokenizer and data.chat_template_kwargs: "
            f"{reason(error)}"
        ) from error
    _compare(tokenizer, name, written, variables)
    try:
        keeping = create_renderer(tokenizer, renderer.config.model_copy(update={"thinking_retention": "all"}))
    except Exception:  # nothing to keep
        keeping = renderer
    return HandWrittenFormat(renderer, keeping, name, tokenizer)


def _compare(tokenizer: SplittingTokenizer, name: str, written: list[int], variables: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if the chat template, which renders prompts of data sets, writes a question otherwise."""
    if not tokenizer.chat_template:
        return
    with boundary("the chat template fails on a question", DataError):
        text = tokenizer.apply_chat_template(PROBE, tokenize=False, add_generation_prompt=True, **variables)
    if tokenizer.encode(text) != written:
        raise ConfigError(
            f"the hand-written renderer {name} writes a question as {tokenizer.decode(written)!r}, the model's chat "
            f"template as {text!r}; set renderer to template"
        )
