"""Scores of a reward model, added to those of the reward."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlcore.batch import Batch
from rlcore.engines import ForwardRequest, ModelSettings
from rlcore.errors import DataError
from rlcore_recipes.data.tokenizer import TOKENIZER_FILES, load_tokenizer

if TYPE_CHECKING:
    from rlcore_recipes.session import Session

logger = logging.getLogger(__name__)


def model_values(session: Session[Any], batch: Batch) -> Batch:
    """The reward model's ``values``, read at every token; under Ray they are computed meanwhile."""
    engine = session.roles.reward_model
    assert engine is not None
    with session.timed.label("reward_model"):
        return engine.forward(batch.select("tokens"), ForwardRequest(("values",)))


def with_model_scores(session: Session[Any], batch: Batch, values: Batch) -> Batch:
    """Add ``reward_model_score`` (dense fp32), the value at each sequence's last token, and add it to ``score``.

    A sample for which the sum is not finite gets ``reward.error_score``, and its result the error "reward_model".
    """
    settings, engine = session.config.reward_model, session.roles.reward_model
    assert engine is not None
    with session.timed("reward_model"):
        scores = session.executor.compute(last_values, values.select("values"))
        if settings.offload:
            engine.offload()
    total = batch["score"] + settings.coeff * scores
    failed = ~torch.isfinite(total)
    if failed.any():
        batch = with_failures(session, batch, failed)
        total = torch.where(failed, session.config.reward.error_score, total)
        scores = torch.where(failed, 0.0, scores)
    return batch.with_columns(score=total, reward_model_score=scores)


def with_failures(session: Session[Any], batch: Batch, failed: torch.Tensor) -> Batch:
    """``batch`` with the error "reward_model" in the results of the samples that ``failed``, ``[B]`` bool."""
    samples = failed.nonzero().flatten().tolist()
    groups = sorted({int(batch["group"][sample]) for sample in samples})
    logger.warning(
        "the reward model's score of %d of %d samples is not finite; they get reward.error_score=%g (prompts %s%s)",
        len(samples),
        len(batch),
        session.config.reward.error_score,
        ", ".join(map(str, groups[:10])),
        " …" if len(groups) > 10 else "",
    )
    marked = session.executor.compute(mark_failed, batch.select("reward_result"), frozenset(samples))
    return batch.with_columns(reward_result=marked["reward_result"])


def mark_failed(batch: Batch, failed: frozenset[int]) -> Batch:
    """``reward_result`` with the error "reward_model" where the sample's number is among ``failed``."""
    results = batch["reward_result"]
    return Batch(
        {
            "reward_result": [
                replace(result, error=result.error or "reward_model") if number in failed else result
                for number, result in enumerate(results)
            ]
        }
    )


def last_values(batch: Batch) -> torch.Tensor:
    """``values`` at the last token of each sequence: ``[B]`` fp32."""
    values: torch.Tensor = batch.flat("values")
    return values[batch.lengths.cumsum(0) - 1]


def check_reward_model(model: ModelSettings, policy: ModelSettings, tokenizer: Any) -> None:
    """See, before anything is built, whether ``model`` can score the tokens of ``policy`` (those of ``tokenizer``).

    Raises:
        DataError: it cannot be read, has no score head, or other tokens.
    """
    from transformers import AutoConfig

    where = f"reward_model.model.path={model.path}"
    folder = Path(model.path).expanduser()

    def config_of(source: ModelSettings) -> Any:
        path = Path(source.path).expanduser()
        return AutoConfig.from_pretrained(
            str(path) if path.is_dir() else source.path, trust_remote_code=source.trust_remote_code
        )

    try:
        config, policy_config = config_of(model), config_of(policy)
    except (OSError, ValueError) as error:
        raise DataError(f"{where} cannot be read as a model: {str(error).strip().splitlines()[0]}") from error
    architectures = config.architectures or []
    if architectures and all(name.endswith("ForCausalLM") for name in architectures):
        raise DataError(
            f"{where} is a language model ({architectures[0]}): a reward model has a scalar score head, as "
            "...ForSequenceClassification with one label"
        )
    size = _vocabulary(policy_config)  # a tokenizer may know more tokens than its model, which never makes those
    if model.tokenizer_path or not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES):
        theirs = load_tokenizer(model).get_vocab()
        odd = [
            token for token, number in tokenizer.get_vocab().items() if number < size and theirs.get(token) != number
        ]
        fits = not odd and _vocabulary(config) >= min(size, len(tokenizer))
    else:  # without a tokenizer, equal sizes are all that can be asked for
        fits = _vocabulary(config) == size
    if not fits:
        raise DataError(
            f"{where} has another vocabulary ({_vocabulary(config)} tokens) than the policy ({size}); a reward model "
            "scores the policy's own tokens, so both need the same tokenizer"
        )


def _vocabulary(config: Any) -> int:
    return int(config.get_text_config().vocab_size)
