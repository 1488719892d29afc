"""Maximum sequence length of a model: the number of its positions, and the limit of its rotary scaling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from warnings import warn

from rlcore.engines.settings import ModelSettings
from rlcore.errors import EngineError, RlcoreWarning

if TYPE_CHECKING:
    import torch


def rope_boundary(config: Any) -> tuple[str, int] | None:
    """Return the kind of rotary scaling and the maximum length without effect on it; None if length has no effect.

    Beyond this length, transformers chooses the frequencies by the longest sequence of a forward pass, and inference
    engines by other rules, so that log-probs would depend on the other sequences of a batch.
    """
    config = config.get_text_config()
    found: list[tuple[str, int]] = []
    for rope in _rope_parameters(config):
        if _kind(rope) == "longrope" or "long_factor" in rope:  # "su" in older configurations
            found.append(("longrope", _original(config, rope)))
        elif _kind(rope) == "dynamic":
            found.append(("dynamic", int(config.max_position_embeddings)))
    return min(found, key=lambda one: one[1], default=None)


def longest_position(config: Any) -> int | None:
    """Return the number of the model's positions, including its rotary scaling; None if it is unknown."""
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        return None
    lengths = [length]
    for rope in _rope_parameters(config):
        factor = rope.get("factor")
        if _kind(rope) in ("linear", "dynamic", "yarn") and isinstance(factor, int | float):
            lengths.append(int(_original(config, rope) * factor))
    return max(lengths)


def check_rope(settings: ModelSettings, config: Any, longest: int, what: str) -> None:
    """Raise `EngineError` if a sequence of ``longest`` tokens would change how the model computes shorter ones.

    Args:
        what: the subject of the error, such as "the longest sequence of the run".
    """
    boundary = rope_boundary(config)
    if boundary is not None and longest > boundary[1]:
        raise EngineError(
            f"{what} has {longest} tokens, but beyond {boundary[1]} the rotary scaling ({boundary[0]}) of the model "
            f"{settings.path!r} depends on the longest sequence that is computed together: log-probs would not be "
            f"those of the rollout; keep sequences within {boundary[1]} tokens (data.max_prompt_length + "
            "data.max_response_length, or data.max_length)"
        )


def check_positions(settings: ModelSettings, config: Any, longest: int) -> None:
    """Raise `EngineError` if the model has fewer than ``longest`` positions."""
    positions = longest_position(config)
    if positions is not None and longest > positions:
        raise EngineError(
            f"sequences may have {longest} tokens, but the model {settings.path!r} has positions for {positions} "
            "(max_position_embeddings); lower data.max_prompt_length or data.max_response_length"
        )


def check_sequences(settings: ModelSettings, config: Any, lengths: torch.Tensor) -> None:
    """Check the ``lengths`` ``[B]`` of sequences that are computed together; warn if the model has too few positions.

    Raises:
        EngineError: the rotary scaling would depend on the longest sequence.
    """
    longest = int(lengths.max()) if len(lengths) else 0
    check_rope(settings, config, longest, "a sequence")
    positions = longest_position(config)
    if positions is not None and longest > positions:
        warn(
            f"sequences are longer than the {positions} positions of the model {settings.path!r} "
            "(max_position_embeddings); the model was not trained beyond them",
            RlcoreWarning,
            stacklevel=2,
        )


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary parameters of the configuration: one set, or one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(found, Mapping):
        return
    if _kind(found) is not None:
        yield found
        return
    yield from (one for one in found.values() if isinstance(one, Mapping))


def _original(config: Any, rope: Mapping[str, Any]) -> int:
    """Return the number of positions before scaling."""
    name = "original_max_position_embeddings"
    return int(rope.get(name) or getattr(config, name, None) or config.max_position_embeddings)


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))
