"""Checks of the models next to the policy (critic, reference, reward models), before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcore.boundary import boundary
from rlcore.engines import ModelSettings
from rlcore.errors import DataError
from rlcore_recipes.data.limits import limited
from rlcore_recipes.data.tokenizer import TOKENIZER_FILES, load_tokenizer

if TYPE_CHECKING:
    from rlcore_recipes.settings import RLConfig


def check_other_models(config: RLConfig, tokenizer: Any) -> None:
    """See whether every model of ``config`` reads the policy's tokens (those of ``tokenizer``).

    Raises:
        DataError: one cannot be read or has other tokens, or the reward model has no score head.
    """
    if config.reward_model is not None:
        outputs = config.reward_model.outputs
        check_model("reward_model.model.path", config.reward_model.model, config.model, tokenizer, scores=outputs)
        if not config.reward_model.any_chat_template:
            _check_template(config.reward_model.model, tokenizer)
    critic = config.critic_role
    if critic is not None and critic.model is not None:
        check_model("critic.model.path", critic.model, config.model, tokenizer)
    prm = config.prm_role
    if prm is not None and prm.model is not None:
        check_model("prm.model.path", prm.model, config.model, tokenizer)
    if config.needs_ref and config.ref.model is not None:
        check_model("ref.model.path", config.ref.model, config.model, tokenizer)


def check_model(key: str, model: ModelSettings, policy: ModelSettings, tokenizer: Any, scores: int = 0) -> None:
    """See whether ``model``, at ``key`` of the configuration, reads the tokens of ``policy``: those of ``tokenizer``.

    Vocabularies may be padded to different sizes.

    Args:
        scores: outputs of the score head that the model needs; 0: none.

    Raises:
        DataError: it does not, or cannot be read.
    """
    where = f"{key}={model.path}"
    folder = Path(model.path).expanduser()
    with boundary(f"{where} cannot be read as a model"):
        config, policy_config = config_of(model), config_of(policy)
        theirs, size = int(config.vocab_size), int(policy_config.vocab_size)
    architectures = config.architectures or []
    if scores and architectures and all(name.endswith("ForCausalLM") for name in architectures):
        raise DataError(
            f"{where} is a language model ({architectures[0]}): a reward model has a scalar score head, as "
            "...ForSequenceClassification with one label; train one with rlcore run rm"
        )
    if scores and architectures and config.num_labels != scores:
        named = f"reward_model.weights has {scores} factors" if scores > 1 else "a reward model gives one number"
        raise DataError(
            f"{where} gives {config.num_labels} labels (num_labels), and {named}: set reward_model.weights to "
            f"{config.num_labels} factors, one for each label, or take another model"
        )
    # a tokenizer may know more tokens than its model, which never makes those
    if model.tokenizer_path or not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES):
        known = load_tokenizer(model).get_vocab()
        odd = [token for token, number in tokenizer.get_vocab().items() if number < size and known.get(token) != number]
        fits = not odd and theirs >= min(size, len(tokenizer))
    else:  # without a tokenizer, equal sizes are all that can be asked for
        fits = theirs == size
    if not fits:
        raise DataError(
            f"{where} has another vocabulary ({theirs} tokens) than the policy ({size}); it is given the policy's own "
            "tokens, so both need the same tokenizer"
        )


def _check_template(model: ModelSettings, tokenizer: Any) -> None:
    """See whether the reward model has learned from conversations that are written as the policy's are.

    Raises:
        DataError: its tokenizer comes with a chat template that writes a conversation differently.
    """
    folder = Path(model.path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    theirs = load_tokenizer(model)
    if not theirs.chat_template or not tokenizer.chat_template:
        return
    written = [_probe(one) for one in (tokenizer, theirs)]
    if None not in written and written[0] != written[1]:
        raise DataError(
            f"reward_model.model.path={model.path} writes conversations by another chat template than the policy, "
            f"{written[1]!r:.200} instead of {written[0]!r:.200}: its scores would be those of texts that it has never "
            "seen; train it with the policy's tokenizer, or set reward_model.any_chat_template=true"
        )


def _probe(tokenizer: Any) -> str | None:
    """Return a conversation under the chat template of ``tokenizer``; None if it wants another conversation."""
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        with boundary("a conversation of two messages cannot be written"), limited():
            return str(tokenizer.apply_chat_template(probe, tokenize=False))
    except DataError:
        return None


def config_of(source: ModelSettings) -> Any:
    """Return the configuration of transformers of ``source``, that of the text model."""
    from transformers import AutoConfig

    path = Path(source.path).expanduser()
    config = AutoConfig.from_pretrained(
        str(path) if path.is_dir() else source.path, trust_remote_code=source.trust_remote_code
    )
    return config.get_text_config()
