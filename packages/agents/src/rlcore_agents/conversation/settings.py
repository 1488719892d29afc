"""Settings of conversations, a base class of the settings of environments."""

from __future__ import annotations

from pydantic import Field

from rlcore.config import Config


class ConversationSettings(Config):
    """How conversations become tokens; settings of environments inherit from it."""

    renderer: str = Field(
        "auto",
        description="What renders conversations and parses replies: auto (the hand-written renderer of the package "
        "renderers where the model's name is one that it knows, else the model's chat template), template, or the name "
        "of a hand-written renderer, e.g. qwen3 for a fine-tuned Qwen3.",
    )
