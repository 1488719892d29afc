"""The tokens that end a completion: those of the model, of its tokenizer, and of its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from warnings import warn

from rlcore.boundary import boundary
from rlcore.engines.settings import ModelSettings
from rlcore.errors import DataError, RlcoreWarning
from rlcore_recipes.data.chat import Message, Renderer
from rlcore_recipes.ranks import launched_as_main

_ANSWER = "answer"


def model_tokens(model: ModelSettings) -> tuple[int, frozenset[int]]:
    """Return the number of tokens that ``model`` knows, and those that end a completion, as its configuration says.

    Raises:
        DataError: it cannot be read.
    """
    from rlcore_kit.model_folder.vocabulary import vocabulary

    with boundary(f"model.path={model.path[:200]}: the model's configuration cannot be read"):
        return vocabulary(model)


def written_ends(renderer: Renderer, chat: bool) -> frozenset[int]:
    """Return the tokens that end an answer in text: the tokenizer's end token and the chat template's.

    Args:
        chat: whether the chat template is used.
    """
    ends = {renderer.tokenizer.eos_token_id, end_of_turn(renderer) if chat else None}
    return frozenset(token for token in ends if token is not None)


def end_of_turn(renderer: Renderer) -> int | None:
    """Return the special token that the chat template writes after an assistant's answer; None if it writes none.

    Under templates such as GLM's it is the one with which the user's next message begins.
    """
    ask = {"role": "user", "content": "question"}
    probe = [ask, {"role": "assistant", "content": _ANSWER}]
    token = _token_after_answer(renderer, probe)
    return _token_after_answer(renderer, [*probe, ask]) if token is None else token


def _token_after_answer(renderer: Renderer, probe: list[Message]) -> int | None:
    where = f"a conversation of {len(probe)} messages"
    try:
        after = renderer.chat_text(probe, where, add_generation_prompt=False).rpartition(_ANSWER)[2]
        ids = renderer.encode([after.lstrip()], [where])[0]
    except DataError:  # the template wants another conversation, and is tried on those of the data next
        return None
    return ids[0] if ids and ids[0] in special_tokens(renderer.tokenizer) else None


def missing_ends(model: ModelSettings, tokenizer: Any, written: frozenset[int]) -> tuple[int, ...]:
    """Return the tokens ``written`` after answers that are no end tokens of ``model``.

    Warns if there are any, and if nothing ends a completion: neither one of these nor an end token of the model.
    """
    size, ends = model_tokens(model)
    missing = tuple(sorted(token for token in written - ends if token < size))
    if not ends and not missing and launched_as_main():
        warn(
            "nothing ends a completion before its longest length: neither the model's files nor its tokenizer and chat "
            "template name an end token that the model knows; name one as eos_token_id in config.json",
            RlcoreWarning,
            stacklevel=2,
        )
    if missing and launched_as_main():
        warn(
            f"answers end with {_named(tokenizer, missing)}, which is not among the model's end tokens "
            f"({_named(tokenizer, sorted(ends)) or 'it has none'}): completions end there too, and an exported model "
            "has both",
            RlcoreWarning,
            stacklevel=2,
        )
    return missing


def check_tokens(tokens: Iterable[int], size: int | None, tokenizer: Any, where: str) -> None:
    """Make sure that the model knows all ``tokens``.

    Args:
        size: of its vocabulary; None checks nothing.
        where: file and row.

    Raises:
        DataError: names the token that it does not know.
    """
    largest = max(tokens, default=0)
    if size is not None and largest >= size:
        raise DataError(
            f"{where}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the model's vocabulary "
            f"of {size}; use the tokenizer that belongs to the model"
        )


def save_tokenizer(tokenizer: Any, stop_tokens: tuple[int, ...], folder: Path) -> None:
    """Write the tokenizer to ``folder``, and make ``stop_tokens`` end tokens of the exported model there.

    The model's files name the end tokens that it had before the run, after which it would not stop. The configuration
    of a reward model gets the padding token.
    """
    tokenizer.save_pretrained(folder)
    if stop_tokens:
        _add_ends(folder, stop_tokens)
    _add_padding(folder, tokenizer.pad_token_id)


def _add_padding(folder: Path, token: int | None) -> None:
    """Name the padding token in a reward model's configuration, without which transformers score no padded batch.

    They read a score at the last token that is not padding. An end token as padding would hide the end of an answer.
    """
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    classifies = any(name.endswith("ForSequenceClassification") for name in values.get("architectures") or ())
    ends = values.get("eos_token_id")
    if classifies and values.get("pad_token_id") is None and token not in (ends if isinstance(ends, list) else [ends]):
        values["pad_token_id"] = token
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _add_ends(folder: Path, tokens: tuple[int, ...]) -> None:
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        before = values.get("eos_token_id")
        before = [] if before is None else [before] if isinstance(before, int) else before
        ends = [*tokens, *(token for token in before if token not in tokens)]
        values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def special_tokens(tokenizer: Any) -> set[int]:
    """Return the ids of the tokenizer's special tokens."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _named(tokenizer: Any, tokens: Iterable[int]) -> str:
    return ", ".join(f"{token} {tokenizer.convert_ids_to_tokens(token)!r}" for token in tokens)
