"""The models that an OpenAI-compatible server lists, and which of them a client uses."""

from __future__ import annotations

from typing import Any

from rlcore.errors import EngineError


def chosen_model(url: str, answer: Any, wanted: str | None, key: str) -> dict[str, Any]:
    """Return the entry of the model ``wanted``, or of the only one, in a server's ``answer`` to ``/v1/models``.

    LoRA adapters are listed with the name of their model (``parent``), and count only if they are wanted.

    Args:
        key: the configuration key that chooses a model.

    Raises:
        EngineError: the server does not list the model, or there are several.
    """
    try:
        cards = {str(card["id"]): card for card in answer["data"]}
        models = [name for name, card in cards.items() if card.get("parent") is None]
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{url} does not list its models in OpenAI's format: {error!r}") from error
    if wanted is not None and wanted not in cards:
        raise EngineError(f"{url} serves {', '.join(cards) or 'no model'}, not {wanted} ({key})")
    if wanted is None and len(models) != 1:
        raise EngineError(f"{url} serves {', '.join(models) or 'no model'}; choose one with {key}")
    return dict(cards[wanted or models[0]])
