"""What a student and a teacher must have in common: the token ids."""

from __future__ import annotations

from rlcore.engines import ModelSettings
from rlcore_recipes.data.end_tokens import model_tokens


def shared_tokens(student: ModelSettings, teacher: ModelSettings | None) -> int:
    """Return how many token ids both models have: the smaller of the two, as vocabularies are padded at their ends."""
    own = model_tokens(student)[0]
    return own if teacher is None else min(own, model_tokens(teacher)[0])
