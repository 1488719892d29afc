"""What a student and a teacher must have in common: the token ids."""

from __future__ import annotations

from typing import Any

from rlcore.engines import ModelSettings
from rlcore.errors import DataError
from rlcore_recipes.data.end_tokens import model_tokens
from rlcore_recipes.settings.distillation import TeacherSettings

NAMED = 3


def shared_tokens(student: ModelSettings, teacher: TeacherSettings) -> int:
    """Return how many token ids both models have: the smaller of the two, as vocabularies are padded at their ends.

    A teacher elsewhere, or with other tokens, leaves all of the student's.
    """
    own = model_tokens(student)[0]
    apart = teacher.scoring is not None or teacher.cross_tokenizer
    return own if teacher.model is None or apart else min(own, model_tokens(teacher.model)[0])


def check_same_tokens(key: str, student: Any, teacher: Any, size: int, *, both: bool) -> None:
    """Make sure that a teacher's tokenizer has the student's tokens under the same ids.

    Args:
        key: of the teacher in the configuration.
        size: number of tokens that the student's model knows; it never makes others of its tokenizer.
        both: the teacher may have no further tokens, which it would name as likely ones.

    Raises:
        DataError: they differ; the message names tokens that do.
    """
    ours, theirs = ({id: token for token, id in tokenizer.get_vocab().items()} for tokenizer in (student, teacher))
    checked = {id for id in ours if id < size} | (theirs.keys() if both else set())
    different = sorted(id for id in checked if ours.get(id) != theirs.get(id))
    if different:
        examples = ", ".join(
            f"{id} is {_shown(theirs, id)} there and {_shown(ours, id)} here" for id in different[:NAMED]
        )
        raise DataError(
            f"{key}: the teacher's tokenizer differs from the student's in {len(different)} tokens ({examples}"
            f"{' …' if len(different) > NAMED else ''}); take a teacher with the student's tokenizer, or set "
            f"{key}.cross_tokenizer=true to compare them by their texts"
        )


def _shown(tokens: dict[int, str], id: int) -> str:
    return repr(tokens[id]) if id in tokens else "no token"
